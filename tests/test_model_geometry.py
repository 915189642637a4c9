# SPDX-License-Identifier: Apache-2.0
"""Non-square images and other resolutions, against the formulas and against timm."""

from __future__ import annotations

import math

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.layers import resample_abs_pos_embed
from torch import Tensor, nn

from fastvit.models import ConViT, create_model, load_checkpoint
from fastvit.testing import CANCELLING, assert_agreement

HEADS, DEPTH, LOCAL = 4, 3, 2


def randomize(model: nn.Module) -> None:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for tensor in model.parameters():
            tensor += 0.05 * torch.randn(tensor.shape, generator=generator)


def convit(img_size: tuple[int, int]) -> ConViT:
    torch.manual_seed(0)
    model = create_model(
        "convit_tiny", img_size=img_size, depth=DEPTH, local_up_to_layer=LOCAL, num_classes=7
    )
    randomize(model)
    return model.eval()


def heads_of(x: Tensor) -> Tensor:
    return x.unflatten(-1, (HEADS, -1)).transpose(1, 2)


def relative_positions(rows: int, columns: int) -> Tensor:
    """(N, N, 3): for query i and key j, dx, dy and dx^2 + dy^2 on a grid read row by row."""
    n = rows * columns
    table = torch.zeros(n, n, 3)
    for i in range(n):
        for j in range(n):
            dx, dy = j % columns - i % columns, j // columns - i // columns
            table[i, j] = torch.tensor([dx, dy, dx**2 + dy**2])
    return table


def gpsa(p: dict[str, Tensor], prefix: str, x: Tensor, positions: Tensor) -> Tensor:
    """Gated positional self-attention with dense maps (arXiv 2103.10697, equations 6 to 8)."""
    q, k = (heads_of(y) for y in F.linear(x, p[f"{prefix}.qk.weight"]).chunk(2, dim=-1))
    v = heads_of(F.linear(x, p[f"{prefix}.v.weight"]))
    scores = F.linear(positions, p[f"{prefix}.pos_proj.weight"], p[f"{prefix}.pos_proj.bias"])
    position = scores.permute(2, 0, 1).softmax(-1)
    content = (q @ k.mT / math.sqrt(q.shape[-1])).softmax(-1)
    gate = p[f"{prefix}.gating_param"].sigmoid().view(-1, 1, 1)
    attention = (1 - gate) * content + gate * position
    mixed = (attention / attention.sum(-1, keepdim=True)) @ v
    return linear(p, f"{prefix}.proj", mixed.transpose(1, 2).flatten(2))


def linear(p: dict[str, Tensor], prefix: str, x: Tensor) -> Tensor:
    return F.linear(x, p[f"{prefix}.weight"], p[f"{prefix}.bias"])


def norm(p: dict[str, Tensor], prefix: str, x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], p[f"{prefix}.weight"], p[f"{prefix}.bias"], eps=1e-6)


def dense_convit(p: dict[str, Tensor], images: Tensor, grid: tuple[int, int]) -> Tensor:
    """The whole model from its state dict, in the dtype of ``p``."""
    embed = "patch_embed.proj"
    x = F.conv2d(images, p[f"{embed}.weight"], p[f"{embed}.bias"], stride=16)
    x = x.flatten(2).mT + p["pos_embed"]
    positions = relative_positions(*grid).to(x.dtype)
    for i in range(DEPTH):
        block = f"blocks.{i}"
        if i == LOCAL:
            x = torch.cat((p["cls_token"].expand(len(x), -1, -1), x), dim=1)
        y = norm(p, f"{block}.norm1", x)
        if i < LOCAL:
            x = x + gpsa(p, f"{block}.attn", y, positions)
        else:
            qkv = F.linear(y, p[f"{block}.attn.qkv.weight"]).chunk(3, dim=-1)
            q, k, v = (heads_of(z) for z in qkv)
            out = (q @ k.mT / math.sqrt(q.shape[-1])).softmax(-1) @ v
            x = x + linear(p, f"{block}.attn.proj", out.transpose(1, 2).flatten(2))
        y = linear(p, f"{block}.mlp.fc1", norm(p, f"{block}.norm2", x))
        x = x + linear(p, f"{block}.mlp.fc2", F.gelu(y))
    return linear(p, "head", norm(p, "norm", x)[:, 0])


@pytest.mark.parametrize(
    "grid",
    [
        pytest.param((4, 6), id="4x6"),
        pytest.param((6, 4), id="6x4"),
        # 64 patches are a square number: a grid guessed from their count would be 8x8.
        pytest.param((4, 16), id="4x16"),
        pytest.param((1, 5), id="1x5"),
        pytest.param((7, 7), id="7x7"),
    ],
)
def test_convit_equals_the_formulas(grid):
    """Output and every gradient on grids that need not be square."""
    rows, columns = grid
    model = convit((16 * rows, 16 * columns))
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, 3, 16 * rows, 16 * columns, generator=generator)
    probe = torch.randn(2, 7, generator=generator)
    names = [name for name, _ in model.named_parameters()]

    def run(p: dict[str, Tensor], output: Tensor) -> dict[str, Tensor]:
        weight = probe.to(output.dtype)
        gradients = torch.autograd.grad((output * weight).sum(), [p[name] for name in names])
        return {"logits": output.detach(), **dict(zip(names, gradients, strict=True))}

    def dense(dtype: torch.dtype) -> dict[str, Tensor]:
        p = {name: v.detach().to(dtype).requires_grad_() for name, v in model.named_parameters()}
        return run(p, dense_convit(p, x.to(dtype), grid))

    actual = run(dict(model.named_parameters()), model(x))
    reference, expected = dense(torch.float32), dense(torch.float64)
    for name in ("logits", *names):
        # The largest error of a vector of a few hundred gradients scatters by more than two.
        options = {"name": name, "rms": name != "logits"}
        if "pos_proj" in name or "gating_param" in name:
            options["floor"] = CANCELLING
        if name.endswith("pos_proj.bias"):
            # Zero in exact arithmetic: the softmax cancels the bias.
            weight = expected[name.replace("bias", "weight")]
            options["scale"] = weight.abs().max().item() or 1.0
        assert_agreement(actual[name], reference[name], expected[name], **options)


def test_transposed_image_is_not_the_same_grid():
    """The 4x6 model and the 6x4 model differ although both have 24 patches."""
    wide, high = convit((64, 96)), convit((96, 64))
    high.load_state_dict(wide.state_dict())
    tokens = torch.randn(1, 24, wide.embed_dim)
    assert not torch.allclose(wide.blocks[0](tokens), high.blocks[0](tokens), rtol=1e-3)


def test_attention_map_knows_the_grid():
    """What the authors' training script asks of every block works on a wide image."""
    model = convit((32, 96))
    tokens = model.patch_embed(torch.randn(2, 3, 32, 96))
    distance, attention = model.blocks[0].attn.get_attention_map(tokens, return_map=True)
    table = relative_positions(2, 6)[..., 2].sqrt()
    expected = (table * attention).sum((1, 2)) / 12
    torch.testing.assert_close(distance, expected)


@pytest.mark.parametrize(
    ("ours", "theirs", "config"),
    [
        ("convit_tiny", "convit_tiny", {"depth": 2, "local_up_to_layer": 1}),
        ("deit_tiny", "deit_tiny_patch16_224", {"depth": 2}),
    ],
    ids=["convit", "deit"],
)
@pytest.mark.parametrize("size", [64, 256, 384])
def test_other_resolutions_equal_timm(ours, theirs, config, size):
    """Weights made at 224 pixels, used at another size: same positions, same logits."""
    trained = timm.create_model(theirs, **config)
    randomize(trained)
    reference = timm.create_model(theirs, img_size=size, **config).eval()
    state = trained.state_dict()
    prefix = state["pos_embed"].shape[1] - 14 * 14
    new_grid = (size // 16, size // 16)
    state["pos_embed"] = resample_abs_pos_embed(
        state["pos_embed"], new_grid, (14, 14), num_prefix_tokens=prefix
    )
    reference.load_state_dict(state)

    model = create_model(ours, img_size=size, **config).eval()
    report = load_checkpoint(model, trained.state_dict())
    assert report.resized == ((14, 14), new_grid)
    torch.testing.assert_close(model.pos_embed, reference.pos_embed, rtol=0, atol=0)
    x = torch.randn(1, 3, size, size)
    with torch.no_grad():
        torch.testing.assert_close(model(x), reference(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("old", "new"), [((4, 4), (3, 6)), ((3, 6), (5, 2)), ((2, 8), (4, 4))], ids=str
)
@pytest.mark.parametrize("name", ["convit_tiny", "deit_tiny", "vit_c_1gf"])
def test_positions_between_any_grids(name, old, new):
    """Non-square old and new grids; the class token's position is carried over."""

    def build(grid: tuple[int, int]) -> nn.Module:
        depth = {"depth": 1, "local_up_to_layer": 0} if name == "convit_tiny" else {"depth": 1}
        return create_model(name, img_size=(16 * grid[0], 16 * grid[1]), **depth)

    trained, model = build(old), build(new)
    report = load_checkpoint(model, trained.state_dict(), grid_size=old)
    assert report.resized == (old, new)
    prefix = trained.pos_embed.shape[1] - math.prod(old)
    assert prefix == (0 if name == "convit_tiny" else 1)
    expected = resample_abs_pos_embed(trained.pos_embed, new, old, num_prefix_tokens=prefix)
    torch.testing.assert_close(model.pos_embed, expected, rtol=0, atol=0)
    torch.testing.assert_close(model.pos_embed[:, :prefix], trained.pos_embed[:, :prefix])


def test_same_grid_is_copied_bit_for_bit():
    """A wide model reads its own checkpoint back, even where the count is a square."""
    trained, model = convit((64, 256)), convit((64, 256))
    randomize(trained)
    assert load_checkpoint(model, trained.state_dict()).resized is None
    assert torch.equal(model.pos_embed, trained.pos_embed)


def test_half_precision_positions_keep_their_dtype():
    trained = create_model("deit_tiny", depth=1, img_size=64, dtype=torch.bfloat16)
    model = create_model("deit_tiny", depth=1, img_size=96, dtype=torch.bfloat16)
    load_checkpoint(model, trained.state_dict())
    expected = resample_abs_pos_embed(trained.pos_embed, (6, 6), (4, 4))
    assert model.pos_embed.dtype == torch.bfloat16
    assert torch.equal(model.pos_embed, expected)


class TestBadGeometry:
    def test_grid_of_another_count(self):
        trained = create_model("deit_tiny", depth=1, img_size=64).state_dict()
        model = create_model("deit_tiny", depth=1, img_size=96)
        with pytest.raises(ValueError, match=r"grid_size \(3, 5\) must hold .* 16 patch"):
            load_checkpoint(model, trained, grid_size=(3, 5))

    def test_grid_that_is_none(self):
        model = create_model("deit_tiny", depth=1, img_size=96)
        with pytest.raises(ValueError, match="grid_size: expected a positive int"):
            load_checkpoint(model, model.state_dict(), grid_size=(6, 0))

    def test_count_that_is_no_square(self):
        """Without the grid of 3x5 positions nothing can be interpolated."""
        trained = create_model("deit_tiny", depth=1, img_size=(48, 80)).state_dict()
        model = create_model("deit_tiny", depth=1, img_size=96)
        with pytest.raises(RuntimeError, match=r"pos_embed: expected shape \(1, 37, 192\), got"):
            load_checkpoint(model, trained)

# SPDX-License-Identifier: Apache-2.0
"""Faults of ``fastvit.accelerate`` that were found once. Each docstring tells the story."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref

import library_models
import pytest
import timm
import torch
from torch import Tensor, nn
from torchvision.models.vision_transformer import VisionTransformer

import fastvit
from fastvit.integrations import attention


def stem() -> nn.Sequential:
    return nn.Sequential(
        *(nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU()),
        *(nn.Conv2d(8, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU()),
        nn.Conv2d(16, 24, 1),
    )


def images(size: int = 32) -> Tensor:
    return torch.randn(2, 3, size, size)


def vit(**options: float) -> nn.Module:
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 1, "num_heads": 2}
    return timm.models.vision_transformer.VisionTransformer(**sizes, num_classes=5, **options)


class Doubled(nn.Module):
    """A stage with the layers of one and another forward."""

    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(before, after, 3, 2, 1, bias=False)
        self.bn = nn.BatchNorm2d(after)
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return 2 * self.relu(self.bn(self.conv(x)))


class Leaky(nn.ReLU):
    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.leaky_relu(x, 0.3)


class Scaled(nn.Sequential):
    def __init__(self, *layers: nn.Module) -> None:
        super().__init__(*layers)
        self.gain = nn.Parameter(torch.ones(1))


@pytest.mark.parametrize(
    "chain",
    [
        lambda: nn.Sequential(Doubled(3, 8), Doubled(8, 16), nn.Conv2d(16, 24, 1)),
        lambda: nn.Sequential(*list(stem())[:2], Leaky(), *list(stem())[3:]),
        lambda: nn.Sequential(Scaled(*list(stem())[:3]), *list(stem())[3:]),
    ],
    ids=["forward", "activation", "parameter"],
)
def test_only_chains_of_known_containers_are_stems(chain) -> None:
    """The layers were looked at, and not what runs them."""
    module = chain()
    with pytest.warns(UserWarning, match="swapped nothing"):
        assert not fastvit.accelerate(module)
    assert fastvit.report(module).skipped
    with pytest.raises(TypeError, match="expected"):
        fastvit.ConvStem.from_module(module)


def changed_convolution(module: nn.Sequential) -> None:
    module[0] = nn.Conv2d(3, 8, 3, 2, 1, bias=False)


def changed_in_place(module: nn.Sequential) -> None:
    with torch.no_grad():
        module[3].weight.mul_(1.5)


def loaded_into_a_child(module: nn.Sequential) -> None:
    module[1].load_state_dict(nn.BatchNorm2d(8).state_dict())


def taking_statistics(module: nn.Sequential) -> None:
    module[1].train()
    module[4].train()


@pytest.mark.parametrize(
    "change", [changed_convolution, changed_in_place, loaded_into_a_child, taking_statistics]
)
@torch.no_grad()
def test_a_snapshot_is_not_used_past_its_sources(change) -> None:
    """Folded weights went on to be used, some with new layers around them."""
    module = stem().eval()
    fastvit.accelerate(module, mode="infer")
    module(images())
    change(module)
    with pytest.raises(RuntimeError, match=r"fastvit\.restore"):
        module(images())


@torch.no_grad()
def test_a_snapshot_is_made_again_when_it_comes_back() -> None:
    """Undoing a later call brought back the weights from before a training step."""
    module, x = stem().eval(), images()
    first = fastvit.accelerate(module, mode="infer")
    with fastvit.accelerate(module):
        module.train()
        module(x)
        module[0].weight.mul_(2.0)
        module.eval()
    got = module(x)
    module.double()
    twice = module(x.double())
    first.undo()
    torch.testing.assert_close(got, module.float()(x))
    torch.testing.assert_close(twice.float(), got)


def test_copies_of_a_snapshot_have_their_own() -> None:
    """A copy's parameters are others, of other versions."""
    module = stem().eval()
    fastvit.accelerate(module, mode="infer")
    x = images()
    with torch.inference_mode():
        expected = module(x)
        for copied in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
            torch.testing.assert_close(copied(x), expected, rtol=0, atol=0)


@torch.no_grad()
def test_stacked_projections_are_not_used_past_their_layers(monkeypatch) -> None:
    """They are made on a GPU; here as there, without a graph, and not past hooks and changes."""
    monkeypatch.setattr(Tensor, "is_cuda", True)
    model = library_models.timm_convit().eval()
    block = model.blocks[0].attn
    with torch.enable_grad():
        fastvit.accelerate(model, layers=("gpsa",), mode="infer")
    monkeypatch.undo()
    assert isinstance(block, attention.AcceleratedGPSA)
    x = torch.randn(2, 16, block.dim)
    stack = block._stack()
    assert stack is not None
    assert not stack[0].requires_grad
    expected = block._original.forward(block, x)
    torch.testing.assert_close(block(x), expected)
    calls: list[nn.Module] = []
    handle = block.v.register_forward_hook(lambda layer, *_: calls.append(layer))
    block(x)
    assert calls == [block.v]
    handle.remove()
    block.qk.weight.mul_(2.0)
    with pytest.raises(RuntimeError, match=r"fastvit\.restore"):
        block(x)


@torch.no_grad()
def test_dropout_of_timm_s_fused_attention_follows_the_layer() -> None:
    """Of its arithmetic it follows the child: people wake the children for Monte-Carlo dropout."""
    model, x = vit(attn_drop_rate=0.5).eval(), images()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.train()
    for fused in (True, False):
        model.blocks[0].attn.fused_attn = fused
        same = torch.equal(model(x), model(x))
        with fastvit.accelerate(model):
            assert torch.equal(model(x), model(x)) == same == fused


@torch.no_grad()
def test_options_of_a_convolution_may_change() -> None:
    """They are plain attributes, and a smaller stride is a common way to denser features."""
    model = vit().eval()
    fastvit.accelerate(model)
    model.patch_embed.proj.stride = (4, 4)
    x = images()
    expected = model.patch_embed._original.forward(model.patch_embed, x)
    assert expected.shape[1] == 49
    torch.testing.assert_close(model.patch_embed(x), expected)
    module = stem().eval()
    fastvit.accelerate(module)
    module(x)
    module[0].padding_mode = "reflect"
    module[0]._reversed_padding_repeated_twice = [1, 1, 1, 1]
    torch.testing.assert_close(module(x), nn.Sequential.forward(module, x))


@torch.no_grad()
def test_torchvision_with_a_method_of_its_own() -> None:
    """One that is put on the model by hand was skipped."""
    model = VisionTransformer(32, 8, 1, 2, 32, 32, num_classes=5).eval()
    model.heads.head.weight.normal_()
    process = model._process_input
    model._process_input = lambda x: 2 * process(x)
    x = images()
    expected = model(x)
    report = fastvit.accelerate(model)
    assert "_process_input" in report.swapped[0].reason
    torch.testing.assert_close(model(x), expected)


def test_a_convolution_by_keyword() -> None:
    """PyTorch's name of the argument is ``input``."""
    module, x = stem().eval(), images()
    expected = module(input=x)
    assert fastvit.accelerate(module, verify={"input": x})
    torch.testing.assert_close(module(input=x), expected)


def test_outputs_without_a_finite_number() -> None:
    module = stem().eval()
    with torch.no_grad():
        module[6].bias.fill_(torch.nan)
    assert fastvit.accelerate(module, verify=images()).max_error == 0.0


def test_a_report_where_the_backend_does_not_run() -> None:
    """It raised; the reason belongs into it."""
    model = vit()
    fastvit.accelerate(model)
    with fastvit.backend("native"):
        report = fastvit.report(model)
    assert {entry.layer for entry in report.swapped} == {"patch_embed"}
    assert report.skipped[0].reason.startswith("backend 'native'")


def test_what_was_left_out_is_not_the_backend_s_fault() -> None:
    """Nothing is swapped whatever the backend, and that is a warning."""
    with pytest.warns(UserWarning, match="swapped nothing"):
        fastvit.accelerate(nn.TransformerEncoderLayer(32, 4), backend="torch")


def test_a_report_keeps_no_model_alive_and_can_be_pickled() -> None:
    module = stem().eval()
    report = fastvit.accelerate(module)
    module(images())
    gc.collect()
    gc.disable()
    try:
        gone = weakref.ref(module)
        del module
        assert gone() is None
    finally:
        gc.enable()
    report.undo()
    assert pickle.loads(pickle.dumps(report)).to_dict() == report.to_dict()
    error = fastvit.NotAccelerated("why", report)
    assert str(pickle.loads(pickle.dumps(error))) == "why"


def test_a_class_put_over_ours_stays() -> None:
    """A parametrisation and ``fully_shard`` change the class too; undoing broke the layer."""
    model = library_models.timm_convit()
    report = fastvit.accelerate(model)
    block = model.blocks[0].attn
    nn.utils.parametrize.register_parametrization(block, "gating_param", nn.Identity())
    kind = type(block)
    with pytest.raises(RuntimeError, match="put over it since"):
        report.undo()
    again = fastvit.accelerate(model)
    assert type(block) is kind
    assert "put over it" in next(e.reason for e in again.skipped if e.name == "blocks.0.attn")


def test_script_is_refused_in_words() -> None:
    module = stem().eval()
    fastvit.accelerate(module)
    with pytest.raises(RuntimeError, match=r"torch\.jit\.script does not compile"):
        torch.jit.script(module)


def test_a_compiled_call_follows_the_backend_of_its_block() -> None:
    """In a fresh thread or process the compiler saw no name that could change."""
    q = torch.randn(1, 2, 4, 16)
    inputs = (q, q, q, torch.randn(2, 3), torch.randn(2), (2, 2))
    graphs = []

    def record(graph: torch.fx.GraphModule, _: list[Tensor]) -> torch.fx.GraphModule:
        graphs.append(graph.code)
        return graph

    compiled = torch.compile(fastvit.functional.gpsa_attention, backend=record)
    compiled(*inputs)
    with fastvit.backend("reference"):
        compiled(*inputs)
    assert len(graphs) == 2
    assert "_gpsa_forward" in graphs[0]
    assert "_gpsa_forward" not in graphs[1]

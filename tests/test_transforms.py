# SPDX-License-Identifier: Apache-2.0
"""What PyTorch users do to a function, done to every public op: compile, export, differentiate,
map, and check the registration.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

import fastvit
from fastvit.functional import (
    ConvStage,
    attention,
    attention_qkvpacked,
    conv_stem,
    gpsa_attention,
    gpsa_attention_qkpacked,
    gpsa_attention_qkvpacked,
    patch_embed,
)

ops = torch.ops.fastvit


class Case(NamedTuple):
    """A public op as a function of tensors alone, the first of which is the batched input."""

    function: Callable[..., Tensor]
    inputs: tuple[Tensor, ...]

    @property
    def learned(self) -> tuple[int, ...]:
        return tuple(i for i, x in enumerate(self.inputs) if x.requires_grad)


GRID = (3, 5)
STRIDES = (2, 1)


def leaf(*shape: int) -> Tensor:
    return torch.randn(*shape).requires_grad_()


def heads(batch: int = 2) -> Tensor:
    """(B, H, N, d) as it comes out of a projection: a transposed view."""
    return torch.randn(batch, 15, 3, 8).transpose(1, 2).detach().requires_grad_()


def gpsa_case() -> Case:
    def function(q: Tensor, k: Tensor, v: Tensor, weight: Tensor, gate: Tensor) -> Tensor:
        return gpsa_attention(q, k, v, weight, gate, GRID)

    return Case(function, (heads(), heads(), heads(), leaf(3, 3), leaf(3)))


def attention_case() -> Case:
    return Case(attention, (heads(), heads(), heads()))


def gpsa_qkpacked_case() -> Case:
    def function(qk: Tensor, v: Tensor, weight: Tensor, gate: Tensor) -> Tensor:
        return gpsa_attention_qkpacked(qk, v, weight, gate, GRID)

    return Case(function, (leaf(2, 15, 2, 3, 8), heads(), leaf(3, 3), leaf(3)))


def gpsa_qkvpacked_case() -> Case:
    def function(qkv: Tensor, weight: Tensor, gate: Tensor) -> Tensor:
        return gpsa_attention_qkvpacked(qkv, weight, gate, GRID)

    return Case(function, (leaf(2, 15, 3, 3, 8), leaf(3, 3), leaf(3)))


def attention_half_case() -> Case:
    """On processors an op of ours only in half precision."""
    return Case(attention, tuple(heads().detach().half().requires_grad_() for _ in range(3)))


def attention_qkvpacked_case() -> Case:
    qkv = leaf(2, 15, 3, 3, 8).detach().half().requires_grad_()
    return Case(attention_qkvpacked, (qkv,))


def patch_embed_case() -> Case:
    def function(x: Tensor, weight: Tensor, bias: Tensor, pos: Tensor, cls: Tensor) -> Tensor:
        return patch_embed(x, weight, bias, pos_embed=pos, cls_token=cls)

    inputs = (leaf(2, 3, 8, 12), leaf(7, 3, 4, 4), leaf(7), leaf(1, 7, 7), leaf(1, 1, 7))
    return Case(function, inputs)


def conv_stem_case(training: bool = False) -> Case:
    channels = (3, 4, 6)
    running = [(torch.zeros(c), torch.ones(c)) for c in channels[1:]]

    def function(x: Tensor, proj: Tensor, bias: Tensor, *stages: Tensor) -> Tensor:
        parameters = [stages[i : i + 3] for i in range(0, len(stages), 3)]
        return conv_stem(
            x,
            [
                ConvStage(*p, *r, stride)
                for p, r, stride in zip(parameters, running, STRIDES, strict=True)
            ],
            proj,
            bias,
            training=training,
        )

    inputs = [leaf(2, 3, 8, 12), leaf(5, 6, 1, 1), leaf(5)]
    for c_in, c_out in itertools.pairwise(channels):
        inputs += [leaf(c_out, c_in, 3, 3), leaf(c_out), leaf(c_out)]
    return Case(function, tuple(inputs))


CASES: dict[str, Callable[[], Case]] = {
    "gpsa": gpsa_case,
    "gpsa_qkpacked": gpsa_qkpacked_case,
    "gpsa_qkvpacked": gpsa_qkvpacked_case,
    "attention": attention_case,
    "attention_half": attention_half_case,
    "attention_qkvpacked": attention_qkvpacked_case,
    "patch_embed": patch_embed_case,
    "conv_stem_eval": conv_stem_case,
    "conv_stem_train": lambda: conv_stem_case(training=True),
}


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> Case:
    return CASES[request.param]()


def gradients(function: Callable[..., Tensor], inputs: tuple[Tensor, ...]) -> list[Tensor]:
    out = function(*inputs)
    # A quadratic loss, so that the incoming gradient is no constant.
    return list(torch.autograd.grad(out.square().sum(), [x for x in inputs if x.requires_grad]))


def assert_all_close(actual: Any, expected: Any) -> None:
    for a, e in zip(actual, expected, strict=True):
        tolerance = max(1e-4, 2 * torch.finfo(e.dtype).eps)
        torch.testing.assert_close(a, e, rtol=tolerance, atol=tolerance * float(e.abs().max() + 1))


@pytest.fixture
def compiler() -> None:
    torch._dynamo.reset()


@pytest.mark.usefixtures("compiler")
def test_compile_has_no_graph_break_and_the_same_gradients(case: Case) -> None:
    compiled = torch.compile(case.function, fullgraph=True)
    expected = case.function(*case.inputs)
    torch.testing.assert_close(compiled(*case.inputs), expected)
    assert_all_close(gradients(compiled, case.inputs), gradients(case.function, case.inputs))
    with torch.no_grad():
        torch.testing.assert_close(compiled(*case.inputs), expected)


@pytest.mark.usefixtures("compiler")
def test_compile_takes_a_new_batch_size_once(case: Case) -> None:
    """Two sizes make one dynamic graph; a third must not compile again."""
    compiled = torch.compile(case.function, fullgraph=True)
    with torch.no_grad():
        for batch in (2, 3):
            compiled(*_with_batch(case, batch))
        with torch.compiler.set_stance("fail_on_recompile"):
            inputs = _with_batch(case, 5)
            torch.testing.assert_close(compiled(*inputs), case.function(*inputs))


def _with_batch(case: Case, batch: int) -> tuple[Tensor, ...]:
    """The inputs with another batch size: of q, k and v, or of the images."""
    return tuple(
        x.detach()[:1].repeat(batch, *[1] * (x.ndim - 1))
        if x.ndim >= 4 and x.shape[0] == 2
        else x.detach()
        for x in case.inputs
    )


def test_func_grad(case: Case) -> None:
    actual = torch.func.grad(
        lambda *inputs: case.function(*inputs).square().sum(), argnums=case.learned
    )(*case.inputs)
    assert_all_close(actual, gradients(case.function, case.inputs))


def test_func_jacrev(case: Case) -> None:
    """The rows of a Jacobian are mapped backward passes; their sum is the gradient of the sum."""
    last = len(case.inputs) - 1
    jacobian = torch.func.jacrev(lambda x: case.function(*case.inputs[:last], x))(case.inputs[last])
    total = jacobian.flatten(0, -case.inputs[last].ndim - 1).sum(0)
    expected = torch.autograd.grad(case.function(*case.inputs).sum(), case.inputs[last])[0]
    assert_all_close([total], [expected])


def test_a_gradient_of_a_gradient_is_refused_by_the_fused_backward() -> None:
    """A silent zero would be the alternative. The reference backend differentiates twice."""
    case = gpsa_case()
    q = case.inputs[0]
    for backend in ("torch", "reference"):
        with fastvit.backend(backend):
            (grad,) = torch.autograd.grad(
                case.function(*case.inputs).square().sum(), q, create_graph=True
            )
        if backend == "torch":
            with pytest.raises(RuntimeError, match="backend='reference'"):
                torch.autograd.grad(grad.sum(), q)
        else:
            assert torch.autograd.grad(grad.sum(), q)[0].abs().max() > 0


@pytest.mark.parametrize("name", CASES)
def test_forward_mode_raises_instead_of_returning_zeros(name: str) -> None:
    case = CASES[name]()
    x, rest = case.inputs[0], case.inputs[1:]
    with pytest.raises(RuntimeError, match="jvp"):
        torch.func.jvp(lambda t: case.function(t, *rest), (x,), (torch.ones_like(x),))


VMAPPED = (
    "gpsa",
    "gpsa_qkpacked",
    "gpsa_qkvpacked",
    "attention_half",
    "patch_embed",
    "conv_stem_eval",
)


@pytest.mark.parametrize("name", [*VMAPPED, "attention_qkvpacked"])
def test_vmap_over_the_input(name: str) -> None:
    case = CASES[name]()
    rest = case.inputs[1:]
    x = torch.stack([case.inputs[0].detach(), 2 * case.inputs[0].detach()], dim=1)
    actual = torch.func.vmap(lambda t: case.function(t, *rest), in_dims=1)(x)
    expected = torch.stack([case.function(t, *rest) for t in x.unbind(1)])
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", VMAPPED)
def test_vmap_over_every_parameter_is_an_ensemble(name: str) -> None:
    case = CASES[name]()
    x = case.inputs[0].detach()
    ensemble = [torch.stack([p.detach(), -0.5 * p.detach()]) for p in case.inputs[1:]]
    actual = torch.func.vmap(lambda *p: case.function(x, *p))(*ensemble)
    expected = torch.stack([case.function(x, *(p[i] for p in ensemble)) for i in range(2)])
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", VMAPPED)
def test_vmap_of_grad_gives_gradients_per_sample(name: str) -> None:
    case = CASES[name]()
    rest = case.inputs[2:]

    def loss(parameter: Tensor, x: Tensor) -> Tensor:
        return case.function(x, parameter, *rest).square().sum()

    parameter = case.inputs[1]
    x = torch.stack([case.inputs[0].detach(), 2 * case.inputs[0].detach()])
    actual = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameter, x)
    expected = [torch.autograd.grad(loss(parameter, sample), parameter)[0] for sample in x]
    assert_all_close(actual.unbind(0), expected)


LAYERS: dict[str, Callable[[], tuple[torch.nn.Module, Tensor]]] = {
    "GPSA": lambda: (fastvit.GPSA(24, 3, grid_size=GRID), torch.randn(2, 15, 24)),
    "MHSA": lambda: (fastvit.MHSA(24, 3), torch.randn(2, 16, 24)),
    "PatchEmbed": lambda: (fastvit.PatchEmbed((8, 12), 4, 3, 10), torch.randn(2, 3, 8, 12)),
    "PatchEmbed_uint8": lambda: (
        fastvit.PatchEmbed((8, 12), 4, 3, 10, mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.2)),
        torch.randint(0, 256, (2, 3, 8, 12), dtype=torch.uint8),
    ),
    "ConvStem": lambda: (fastvit.ConvStem(3, (4, 6), (2, 2), 10), torch.randn(2, 3, 9, 12)),
    "ConvStem_gray": lambda: (fastvit.ConvStem(1, (4, 6), (2, 2), 10), torch.randn(2, 1, 9, 12)),
}


@pytest.fixture(params=LAYERS)
def layer(request: pytest.FixtureRequest) -> tuple[torch.nn.Module, Tensor]:
    return LAYERS[request.param]()


@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_layers_compile(layer: tuple[torch.nn.Module, Tensor], training: bool) -> None:
    module, x = layer
    module.train(training)
    expected = module(x)
    compiled = torch.compile(module, fullgraph=True)
    actual = compiled(x)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
    actual.square().sum().backward()
    actual_grads = [p.grad.clone() for p in module.parameters()]
    module.zero_grad()
    module(x).square().sum().backward()
    assert_all_close(actual_grads, [p.grad for p in module.parameters()])


def test_layers_export_with_a_dynamic_batch(
    layer: tuple[torch.nn.Module, Tensor], tmp_path: Any
) -> None:
    module, x = layer
    module.eval()
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(module, (x,), dynamic_shapes=({0: batch},))
    torch.export.save(program, tmp_path / "layer.pt2")
    loaded = torch.export.load(tmp_path / "layer.pt2").module()
    for size in (1, 2, 5):
        sample = x[:1].repeat(size, *[1] * (x.ndim - 1))
        torch.testing.assert_close(loaded(sample), module(sample), rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("compiler")
def test_gpsa_compiles_for_several_square_grids() -> None:
    module = fastvit.GPSA(32, 4)
    compiled = torch.compile(module, fullgraph=True)
    for tokens in (16, 25, 49):
        x = torch.randn(1, tokens, 32)
        torch.testing.assert_close(compiled(x), module(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["GPSA", "PatchEmbed", "PatchEmbed_uint8"])
def test_vmap_of_layers(name: str) -> None:
    module, x = LAYERS[name]()
    stacked = torch.stack([x, x.flip(0)])
    expected = torch.stack([module(sample) for sample in stacked])
    torch.testing.assert_close(torch.func.vmap(module)(stacked), expected, rtol=1e-4, atol=1e-5)


def test_func_grad_of_layers(layer: tuple[torch.nn.Module, Tensor]) -> None:
    module, x = layer
    module.eval()
    parameters = dict(module.named_parameters())
    actual = torch.func.grad(lambda p: torch.func.functional_call(module, p, (x,)).square().sum())(
        parameters
    )
    module(x).square().sum().backward()
    assert_all_close(actual.values(), [p.grad for p in module.parameters()])


@pytest.mark.parametrize("strict", [False, True], ids=["traced", "strict"])
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_an_exported_program_trains(
    layer: tuple[torch.nn.Module, Tensor], training: bool, strict: bool
) -> None:
    """It holds the bare ops, whose outputs would look differentiable and give no gradient."""
    torch._dynamo.reset()
    module, x = layer
    module.train(training)
    twin = copy.deepcopy(module)
    exported = torch.export.export(module, (x,), strict=strict).module()
    out = exported(x)
    out.square().sum().backward()
    expected = twin(x)
    expected.square().sum().backward()
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
    actual = dict(exported.named_parameters())
    for name, parameter in twin.named_parameters():
        assert actual[name].grad is not None, name
        assert_all_close([actual[name].grad], [parameter.grad])


def stem_lists(training: bool) -> list[Any]:
    parameters = [x.detach() for x in conv_stem_case().inputs[3:]]
    lists: list[Any] = [list(parameters[i::3]) for i in range(3)]
    statistics = [[torch.zeros(c) for c in (4, 6)], [torch.ones(c) for c in (4, 6)]]
    return [*lists, *([[], []] if training else statistics), list(STRIDES)]


def stem_sample(channels: tuple[int, ...], training: bool, save: bool) -> tuple[Any, ...]:
    """Arguments of the stem's forward op; a channel count of 1 is where layouts get ambiguous."""
    x = torch.randn(2, channels[0], 8, 12)
    proj, bias = torch.randn(5, channels[-1], 1, 1), torch.randn(5)
    weights = [torch.randn(o, i, 3, 3) for i, o in itertools.pairwise(channels)]
    vectors = [[torch.rand(c) + 0.5 for c in channels[1:]] for _ in range(4)]
    lists = [weights, *vectors[:2], *([[], []] if training else vectors[2:])]
    strides = list(STRIDES)[: len(weights)]
    return x, proj, bias, None, None, *lists, strides, training, 1e-5, None, None, save, "", "auto"


def opcheck_samples() -> dict[str, tuple[Any, tuple[Any, ...]]]:
    # The bare ops carry no gradient.
    q, k, v, weight, gate = (x.detach() for x in gpsa_case().inputs)
    image, kernel, bias, pos, cls = (x.detach() for x in patch_embed_case().inputs)
    frame = torch.randint(0, 256, (2, 3, 8, 12), dtype=torch.uint8)
    frame = frame.to(memory_format=torch.channels_last)
    mean = [0.4, 0.5, 0.6]
    stem = (torch.randn(2, 3, 8, 12), torch.randn(5, 6, 1, 1), torch.randn(5), None, None)
    options = (1e-5, None, None)
    raw = [torch.randn(2, c, 4, 6).to(memory_format=torch.channels_last) for c in (4, 6)]
    statistics = [[torch.zeros(4), torch.zeros(6)], [torch.ones(4), torch.ones(6)]]
    gpsa_options = (*GRID, 0.35, "auto")
    return {
        "gpsa_forward": (ops._gpsa_forward, (q, k, v, weight, gate, *gpsa_options)),
        "gpsa_forward_contiguous": (
            ops._gpsa_forward,
            (q.contiguous(), k.contiguous(), v.contiguous(), weight, gate, *gpsa_options),
        ),
        "gpsa_forward_empty": (
            ops._gpsa_forward,
            (q[:0], k[:0], v[:0], weight, gate, *gpsa_options),
        ),
        "gpsa_backward": (
            ops._gpsa_backward,
            (torch.randn(2, 3, 15, 8), q, k, v, weight, gate, *gpsa_options),
        ),
        "gpsa_backward_qkvpacked": (
            ops._gpsa_backward_qkvpacked,
            (torch.randn(2, 3, 15, 8), q, k, v, weight, gate, *gpsa_options),
        ),
        "gpsa_backward_empty": (
            ops._gpsa_backward,
            (torch.randn(0, 3, 15, 8), q[:0], k[:0], v[:0], weight, gate, *gpsa_options),
        ),
        "gpsa_dropout_seed": (ops._gpsa_dropout_seed, (q,)),
        "gpsa_dropout_forward": (
            ops._gpsa_dropout_forward,
            (q, k, v, weight, gate, torch.tensor([7]), *GRID, 0.35, 0.1, "auto"),
        ),
        "gpsa_dropout_backward": (
            ops._gpsa_dropout_backward,
            (torch.randn(2, 3, 15, 8), q, k, v, weight, gate, torch.tensor([7]), *GRID, 0.35, 0.1,
             "auto"),
        ),
        "mhsa_forward": (ops._mhsa_forward, (q, k, v, 0.35, "auto")),
        "mhsa_forward_empty": (ops._mhsa_forward, (q[:0], k[:0], v[:0], 0.35, "auto")),
        "mhsa_backward": (ops._mhsa_backward, (torch.randn(2, 3, 15, 8), q, k, v, 0.35, "auto")),
        "patch_embed_forward": (
            ops._patch_embed_forward,
            (image, kernel, bias, pos, cls, None, None, "auto"),
        ),
        "patch_embed_forward_uint8": (
            ops._patch_embed_forward,
            (frame, kernel, None, None, None, mean, mean, "auto"),
        ),
        "patch_embed_backward": (
            ops._patch_embed_backward,
            (torch.randn(2, 7, 7), image, kernel, bias, pos, cls, None, None, [True] * 5, "auto"),
        ),
        "patch_embed_backward_uint8": (
            ops._patch_embed_backward,
            (torch.randn(2, 6, 7), frame, kernel, None, None, None, mean, mean,
             [False, True, False, False, False], "auto"),
        ),
        **{
            f"conv_stem_forward_{name}_training_{training}_save_{save}": (
                ops._conv_stem_forward,
                stem_sample(channels, training, save),
            )
            for name, channels in {"rgb": (3, 4, 6), "gray": (1, 4, 1)}.items()
            for training in (False, True)
            for save in (False, True)
        },
        "conv_stem_backward": (
            ops._conv_stem_backward,
            (torch.randn(2, 24, 5), *stem, raw, *stem_lists(True)[:3], *statistics,
             list(STRIDES), True, *options, [True, True, True, False, False] + [True] * 6, "", [],
             "auto"),
        ),
        "update_running_statistics": (
            ops._update_running_statistics,
            ([torch.zeros(4), torch.ones(4)], [torch.randn(4), torch.rand(4)], [48], [], 0.1, None),
        ),
        "update_running_statistics_on_the_device": (
            ops._update_running_statistics,
            ([torch.zeros(4), torch.ones(4)], [torch.randn(4), torch.rand(4)], [48],
             [torch.tensor(96.0)], 0.0, torch.rand(1)),
        ),
    }  # fmt: skip


@pytest.mark.parametrize("name", opcheck_samples())
def test_opcheck(name: str) -> None:
    op, arguments = opcheck_samples()[name]
    torch.library.opcheck(op.default, arguments)


def test_every_registered_op_has_an_opcheck() -> None:
    registered = {n for n in torch._C._dispatch_get_all_op_names() if n.startswith("fastvit::")}
    checked = {op.default.name() for op, _ in opcheck_samples().values()}
    assert registered == checked

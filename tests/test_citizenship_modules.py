# SPDX-License-Identifier: Apache-2.0
"""What users do with an ``nn.Module``, done to layers and models. Of the layers much stands in
test_contract_modules.py.
"""

from __future__ import annotations

import copy
import functools
import io
import pickle
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import timm
import torch
from citizenship_cases import (
    GRID,
    HEADS,
    LAYERS,
    MODELS,
    OPS,
    SMALL_MODELS,
    WIDTH,
    Case,
    assert_same,
    batch_of,
    each,
    small_model,
    step,
)
from timm.layers import HybridEmbed, PatchEmbed
from timm.models.convit import GPSA, MHSA
from timm.models.vision_transformer_hybrid import ConvStem
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    checkpoint_sequential,
    create_selective_checkpoint_contexts,
)

import fastvit
from fastvit.ops import conv_stem_torch, gpsa_torch, patch_embed_torch


def saved(module: nn.Module, **options: Any) -> nn.Module:
    buffer = io.BytesIO()
    torch.save(module, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


class TestCopies:
    @each(MODELS)
    @pytest.mark.parametrize(
        "duplicate",
        [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), saved],
        ids=["deepcopy", "pickle", "torch.save"],
    )
    def test_models(self, case: Case, duplicate: Callable[[nn.Module], nn.Module]) -> None:
        model, x = case.make()
        # A module that has been used holds no more than before.
        model(x).sum().backward()
        twin = duplicate(model)
        assert str(twin) == str(model)
        assert_same(step(twin, x), step(model, x), rtol=0)
        with torch.no_grad():
            for parameter in twin.parameters():
                parameter.add_(1)
        assert_same([model(x)], [case.make()[0](x)], rtol=0)

    @each(MODELS)
    def test_state_dicts_are_read_with_weights_only(self, case: Case) -> None:
        model, x = case.make()
        buffer = io.BytesIO()
        torch.save(model.state_dict(), buffer)
        buffer.seek(0)
        twin, _ = case.build()
        twin.load_state_dict(torch.load(buffer, weights_only=True), strict=True)
        assert_same([twin.eval()(x)], [model(x)], rtol=0)

    @each(LAYERS, MODELS)
    def test_share_memory(self, case: Case) -> None:
        """As the workers of A3C and of torch.multiprocessing's examples do."""
        module, x = case.make()
        expected = module(x)
        module.share_memory()
        assert all(t.is_shared() for t in module.state_dict().values())
        assert_same([module(x)], [expected], rtol=0)


def built_on_meta(case: Case) -> nn.Module:
    with torch.device("meta"):
        module, _ = case.build()
    assert all(t.is_meta for t in (*module.parameters(), *module.buffers()))
    return module


class TestMeta:
    @each(LAYERS, MODELS)
    def test_empty_then_loaded(self, case: Case) -> None:
        source, x = case.make()
        module = built_on_meta(case).to_empty(device="cpu")
        module.load_state_dict(source.state_dict(), strict=True)
        assert_same([module.eval()(x)], [source(x)], rtol=0)

    @each(LAYERS, MODELS)
    def test_empty_then_initialised(self, case: Case) -> None:
        """As FSDP's users do: models by ``init_weights``, layers by what PyTorch looks for."""
        torch.manual_seed(3)
        expected, _ = case.build()
        module = built_on_meta(case).to_empty(device="cpu")
        with torch.no_grad():
            for tensor in (*module.parameters(), *module.buffers()):
                tensor.fill_(torch.nan if tensor.is_floating_point() else 7)
        torch.manual_seed(3)
        if hasattr(module, "init_weights"):
            module.init_weights()
        else:
            for part in module.modules():
                if hasattr(part, "reset_parameters"):
                    part.reset_parameters()
        wanted = expected.state_dict()
        assert list(module.state_dict()) == list(wanted)
        for name, tensor in module.state_dict().items():
            assert torch.equal(tensor, wanted[name]), name

    @pytest.mark.parametrize(
        ("kind", "args"),
        [
            (fastvit.GPSA, (WIDTH, HEADS)),
            (fastvit.MHSA, (WIDTH, HEADS)),
            (fastvit.ConvStem, (3, (4,), (2,), 5)),
            (fastvit.PatchEmbed, (8, 4)),
        ],
        ids=lambda value: getattr(value, "__name__", ""),
    )
    def test_skip_init(self, kind: type[nn.Module], args: tuple[Any, ...]) -> None:
        module = nn.utils.skip_init(kind, *args, device="cpu")
        assert type(module) is kind
        assert {p.device.type for p in module.parameters()} == {"cpu"}
        module.load_state_dict(kind(*args).state_dict())

    @each(MODELS)
    def test_shapes(self, case: Case) -> None:
        model, x = case.make()
        assert built_on_meta(case).eval()(x.to("meta")).shape == model(x).shape


class TestDefaults:
    @each(LAYERS, MODELS)
    def test_dtype(self, case: Case) -> None:
        torch.set_default_dtype(torch.float64)
        try:
            module, x = case.make(training=True)
            results = step(module, x)
        finally:
            torch.set_default_dtype(torch.float32)
        assert {t.dtype for t in results} == {torch.float64}

    @each(LAYERS, MODELS)
    def test_dtype_of_another_module(self, case: Case) -> None:
        """What is made on the way has the dtype of the parameters and not the default."""
        module, x = case.make(training=True)
        expected = step(copy.deepcopy(module), x)
        torch.set_default_dtype(torch.float64)
        try:
            actual = step(module, x)
        finally:
            torch.set_default_dtype(torch.float32)
        assert [t.dtype for t in actual] == [t.dtype for t in expected]
        assert_same(actual, expected)

    @each(OPS, LAYERS, MODELS)
    def test_device_of_another_module(self, case: Case) -> None:
        """So for the device."""
        module, x = case.make(training=True)
        expected = step(copy.deepcopy(module), x)
        torch.set_default_device("meta")
        try:
            actual = step(module, x)
        finally:
            torch.set_default_device(None)
        assert {t.device.type for t in actual} == {"cpu"}
        assert_same(actual, expected)

    @each(LAYERS, MODELS)
    def test_device(self, case: Case) -> None:
        torch.set_default_device("meta")
        try:
            module, x = case.build()
            assert module(x).is_meta
        finally:
            torch.set_default_device(None)


class TestConversions:
    @each(MODELS)
    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
    def test_dtypes_of_models(self, case: Case, dtype: torch.dtype) -> None:
        model, x = case.make()
        expected = step(copy.deepcopy(model).double(), x.double())
        actual = step(model.to(dtype), x.to(dtype))
        assert {t.dtype for t in actual} == {dtype}
        assert_same(actual, [e.to(dtype) for e in expected], rtol=20 * torch.finfo(dtype).eps)

    @each(OPS, LAYERS, MODELS)
    def test_channels_last(self, case: Case) -> None:
        module, x = case.make(training=True)
        twin = copy.deepcopy(module).to(memory_format=torch.channels_last)
        like = x.to(memory_format=torch.channels_last) if x.ndim == 4 else x
        assert_same(step(twin, like), step(module, x))


def timm_stem() -> nn.Module:
    return ConvStem(
        3, depth=3, channels=(4, 6, 10), kernel_size=(3, 3, 1), stride=(2, 2, 1)
    )  # fmt: skip


def timm_model(name: str) -> nn.Module:
    options = dict(SMALL_MODELS[name])
    if name.startswith("convit"):
        # timm takes the width of a head under this name.
        return timm.create_model(name, **{**options, "embed_dim": WIDTH // HEADS})
    channels, strides = options.pop("stem_channels", None), options.pop("stem_strides", None)
    if channels is not None:
        stem = ConvStem(
            3, depth=3, channels=(*channels, WIDTH), kernel_size=(3, 3, 1), stride=(*strides, 1)
        )
        # A patch of the feature map.
        options["patch_size"] = 1
        options["embed_layer"] = functools.partial(HybridEmbed, stem, proj=False)
    return timm.models.VisionTransformer(**options)


PEERS: dict[str, Callable[[], nn.Module]] = {
    "GPSA": lambda: GPSA(WIDTH, HEADS, qkv_bias=True),
    "MHSA": lambda: MHSA(WIDTH, HEADS),
    "PatchEmbed": lambda: PatchEmbed((8, 12), 4, embed_dim=10),
    "ConvStem": timm_stem,
    **{name: functools.partial(timm_model, name) for name in SMALL_MODELS},
}


class TestNames:
    @pytest.mark.parametrize("name", PEERS)
    def test_in_the_order_of_timm(self, name: str) -> None:
        """Optimizers and checkpoints of optimizers know parameters by their number."""
        ours, _ = next(c for c in (*LAYERS, *MODELS) if c.name == name).build()
        theirs = PEERS[name]()
        assert [(n, p.shape) for n, p in ours.named_parameters()] == [
            (n, p.shape) for n, p in theirs.named_parameters()
        ]
        assert list(ours.state_dict()) == list(theirs.state_dict())


class LoRA(nn.Module):
    """A frozen layer and what is learned beside it."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.down = nn.Linear(base.in_features, 2, bias=False)
        self.up = nn.Linear(2, base.out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(x))

    def merged(self) -> nn.Linear:
        merged = copy.deepcopy(self.base)
        with torch.no_grad():
            merged.weight += self.up.weight @ self.down.weight
        return merged


def learned_layers(module: nn.Module) -> dict[str, nn.Module]:
    return {
        name: child
        for name, child in module.named_modules()
        if isinstance(child, (nn.Linear, nn.Conv2d))
    }


class TestChildren:
    @each(LAYERS, MODELS)
    @pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
    def test_weight_norm(self, case: Case, training: bool) -> None:
        """A parametrisation by magnitude and direction: the same weights, new parameters."""
        module, x = case.make(training)
        expected = module(x)
        module, _ = case.make(training)
        for child in learned_layers(module).values():
            parametrizations.weight_norm(child)
        out = module(x)
        assert_same([out], [expected])
        out.square().sum().backward()
        assert all(p.grad is not None for p in module.parameters())
        with torch.no_grad():
            for child in learned_layers(module).values():
                child.parametrizations.weight.original0.mul_(2)
        assert not torch.allclose(module(x), expected, rtol=0.01)

    @each(LAYERS, MODELS)
    def test_prune(self, case: Case) -> None:
        (module, x), (twin, _) = case.make(), case.make()
        dense = module(x)
        for child in (*learned_layers(module).values(), *learned_layers(twin).values()):
            prune.l1_unstructured(child, "weight", amount=0.5)
        for child in learned_layers(twin).values():
            prune.remove(child, "weight")
        assert not torch.allclose(module(x), dense, rtol=0.01)
        assert_same([module(x)], [twin(x)])
        # A mask is put on the weights of the call, by a hook.
        with torch.no_grad():
            for child in learned_layers(module).values():
                child.weight_orig.mul_(2)
            for child in learned_layers(twin).values():
                child.weight.mul_(2)
        assert_same([module(x)], [twin(x)])
        module(x).square().sum().backward()
        for name, child in learned_layers(module).items():
            assert (child.weight_orig.grad[child.weight_mask == 0] == 0).all(), name

    @pytest.mark.parametrize("name", [c.name for c in (*LAYERS[:2], *MODELS)])
    def test_lora(self, name: str) -> None:
        module, x = next(c for c in (*LAYERS, *MODELS) if c.name == name).make()
        module.requires_grad_(False)
        adapters = {}
        for child_name, child in learned_layers(module).items():
            if isinstance(child, nn.Linear):
                adapters[child_name] = LoRA(child)
                module.set_submodule(child_name, adapters[child_name])
        out = module(x)
        out.square().sum().backward()
        missing = [n for n, p in module.named_parameters() if p.requires_grad and p.grad is None]
        assert not missing
        for child_name, adapter in adapters.items():
            module.set_submodule(child_name, adapter.merged())
        assert_same([module(x)], [out])

    @pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated:DeprecationWarning")
    @each(LAYERS, MODELS)
    def test_dynamic_quantisation(self, case: Case) -> None:
        """int8 weights of the linear layers, also of those that a fused forward reads itself."""
        module, x = case.make()
        quantized = torch.ao.quantization.quantize_dynamic(copy.deepcopy(module), {nn.Linear})
        kinds = {type(child) for child in quantized.modules()}
        assert nn.Linear not in kinds
        out, expected = quantized(x), module(x)
        error = (out - expected).norm() / expected.norm()
        linear = any(isinstance(child, nn.Linear) for child in module.modules())
        assert error < 0.1
        assert (error > 0) == linear

    @each(LAYERS, MODELS)
    def test_frozen(self, case: Case) -> None:
        module, x = case.make(training=True)
        twin = copy.deepcopy(module)
        expected = twin(x.requires_grad_())
        (wanted,) = torch.autograd.grad(expected.square().sum(), x)
        module.requires_grad_(False)
        assert not module(x.detach()).requires_grad
        # Running statistics have moved once too often for the next.
        module.load_state_dict(case.make()[0].state_dict())
        out = module(x)
        (actual,) = torch.autograd.grad(out.square().sum(), x)
        assert_same([out, actual], [expected, wanted])

    @each(LAYERS, MODELS)
    def test_hooks_on_the_module(self, case: Case) -> None:
        module, x = case.make()
        seen = []
        module.register_forward_pre_hook(lambda m, args: seen.append("pre"))
        module.register_forward_hook(lambda m, args, out: seen.append("forward"))
        module.register_full_backward_pre_hook(lambda m, grads: seen.append("backward pre"))
        module.register_full_backward_hook(lambda m, i, o: seen.append("backward"))
        module(x.requires_grad_()).sum().backward()
        assert seen == ["pre", "forward", "backward pre", "backward"]

    @each(LAYERS, MODELS)
    @pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
    @pytest.mark.parametrize("grad", [False, True], ids=["no_grad", "grad"])
    def test_hooks_on_every_child(self, case: Case, training: bool, grad: bool) -> None:
        """Each fires once, alone and together, and leaves the result as it is. Not one of GPSA's
        own is left out: the dropout of the map, which the fused op does not have, included.
        """
        module, x = case.make(training)
        expected = copy.deepcopy(module)(x)
        seen: dict[str, int] = {}
        for name, child in module.named_modules():
            # Of lists and of stages that stand in them nobody calls the container.
            if not isinstance(child, nn.ModuleList):
                seen[name] = 0

                def count(*_: Any, name: str = name) -> None:
                    seen[name] += 1

                child.register_forward_hook(count)
        with torch.set_grad_enabled(grad):
            out = module(x)
        assert_same([out], [expected])
        # A block drops both of its paths by one module.
        twice = {name for name in seen if name.endswith("drop_path")}
        assert {name: n for name, n in seen.items() if n != 1 + (name in twice)} == {}

    def test_global_hooks_see_linear_layers(self) -> None:
        """Also in inference, where their products go by another operator."""
        options = {**SMALL_MODELS["convit_tiny"], "img_size": 64}
        model, x = fastvit.create_model("convit_tiny", **options).eval(), torch.randn(2, 3, 64, 64)
        seen = []
        handle = nn.modules.module.register_module_forward_hook(
            lambda module, args, out: seen.append(module)
        )
        with handle, torch.no_grad():
            model(x)
        linear = {m for m in model.modules() if isinstance(m, nn.Linear)}
        # The weights of the positions are read: they have no input that anybody made.
        assert linear - set(seen) == {model.blocks[0].attn.pos_proj}


class TestCheckpoints:
    @each(MODELS)
    @pytest.mark.parametrize("reentrant", [False, True], ids=["", "reentrant"])
    def test_of_a_model(self, case: Case, reentrant: bool) -> None:
        model, x = case.make(training=True)
        twin = copy.deepcopy(model)
        _, *expected = step(twin, x)
        inputs = x.requires_grad_()
        checkpoint(model, inputs, use_reentrant=reentrant).square().sum().backward()
        assert_same([p.grad for p in model.parameters() if p.requires_grad], expected)

    @each(MODELS)
    @pytest.mark.parametrize("reentrant", [False, True], ids=["", "reentrant"])
    def test_of_its_blocks(self, case: Case, reentrant: bool) -> None:
        model, x = case.make(training=True)
        twin = copy.deepcopy(model)
        expected = step(twin, x)
        forwards = [block.forward for block in model.blocks]
        for block, forward in zip(model.blocks, forwards, strict=True):
            block.forward = functools.partial(checkpoint, forward, use_reentrant=reentrant)
        assert_same(step(model, x), expected)

    def test_sequential(self) -> None:
        model, x = MODELS[1].make(training=True)
        tokens = model._embed(x).detach().requires_grad_()
        plain = nn.Sequential(*model.blocks)
        expected = plain(tokens)
        out = checkpoint_sequential(plain, 2, tokens, use_reentrant=False)
        wanted, actual = (torch.autograd.grad(y.square().sum(), tokens) for y in (expected, out))
        assert_same(actual, wanted)

    @each(MODELS)
    def test_selective(self, case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
        """A policy knows our ops by name: what it keeps does not run again."""
        ran = []
        for implementation in (gpsa_torch, conv_stem_torch, patch_embed_torch):
            forward = implementation.forward
            monkeypatch.setattr(
                implementation, "forward", lambda *a, f=forward: ran.append(f) or f(*a)
            )
        model, x = case.make(training=True)
        twin = copy.deepcopy(model)
        _, *expected = step(twin, x)
        keep = {
            op.default
            for op in (
                torch.ops.fastvit._gpsa_forward,
                torch.ops.fastvit._patch_embed_forward,
                torch.ops.fastvit._conv_stem_forward,
            )
        }

        def policy(kept: Any, context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
            return CheckpointPolicy.MUST_SAVE if op in kept else CheckpointPolicy.PREFER_RECOMPUTE

        for kept, times in ((keep, 1), ((), 2)):
            contexts = functools.partial(
                create_selective_checkpoint_contexts, functools.partial(policy, kept)
            )
            ran.clear()
            model.zero_grad()
            # What a backward computes again follows the backend of its own time.
            with fastvit.backend("torch"):
                out = checkpoint(model, x, use_reentrant=False, context_fn=contexts)
                once = len(ran)
                out.square().sum().backward()
            assert len(ran) == times * once > 0
            assert_same([p.grad for p in model.parameters() if p.requires_grad], expected)

    @each(MODELS)
    def test_dropout_is_drawn_again(self, case: Case) -> None:
        rates = {"proj_drop_rate": 0.3, "attn_drop_rate": 0.3, "drop_path_rate": 0.3}
        model, x = small_model(case.name, **rates)
        model.train()
        torch.manual_seed(5)
        _, *expected = step(model, x)
        model.zero_grad()
        torch.manual_seed(5)
        checkpoint(model, x, use_reentrant=False).square().sum().backward()
        assert_same([p.grad for p in model.parameters() if p.requires_grad], expected)


class TestTracers:
    @each(LAYERS)
    def test_a_layer_is_a_node_of_fx(self, case: Case) -> None:
        layer, x = case.make()
        traced = torch.fx.symbolic_trace(nn.Sequential(layer, nn.ReLU()))
        calls = [node.target for node in traced.graph.nodes if node.op == "call_module"]
        assert calls == ["0", "1"]
        assert traced.get_submodule("0") is layer
        sample = batch_of(x, 3)
        assert_same([traced(sample)], [layer(sample).relu()], rtol=0)

    def test_arguments_of_a_node(self) -> None:
        class Holder(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.attn = fastvit.GPSA(WIDTH, HEADS)

            def forward(self, x: Tensor) -> Tensor:
                return self.attn(x, grid_size=GRID)

        holder, x = Holder(), torch.randn(2, 15, WIDTH)
        traced = torch.fx.symbolic_trace(holder)
        assert_same([traced(x)], [holder(x)], rtol=0)

    @each(MODELS)
    @pytest.mark.parametrize("grad", [False, True], ids=["no_grad", "grad"])
    def test_models(self, case: Case, grad: bool) -> None:
        model, x = case.make()
        with torch.set_grad_enabled(grad):
            traced = torch.fx.symbolic_trace(model)
        for size in (2, 3):
            sample = batch_of(x, size)
            out, expected = traced(sample), step(model, sample)
            # In the order of their use, among them.
            out.square().sum().backward()
            assert_same([out, *(p.grad for p in model.parameters())], expected)

    @each(MODELS)
    def test_feature_extraction(self, case: Case) -> None:
        """torchvision's, with names of nodes as users know them."""
        from torchvision.models.feature_extraction import create_feature_extractor

        model, x = case.make()
        extractor = create_feature_extractor(model, {"blocks.0.attn": "map", "head": "logits"})
        features = extractor(x)
        assert_same([features["logits"]], [model(x)])
        assert features["map"].shape[-1] == WIDTH

    @each(LAYERS)
    def test_the_inside_of_a_layer_is_refused(self, case: Case) -> None:
        layer, _ = case.make()
        with pytest.raises(TypeError, match=rf"torch\.fx does not trace.*{case.name}"):
            torch.fx.symbolic_trace(layer)

    @each(LAYERS, MODELS)
    def test_script_is_refused_in_words(self, case: Case) -> None:
        module, _ = case.make()
        with pytest.raises(RuntimeError, match=r"fastvit: torch\.jit\.script.*torch\.export"):
            torch.jit.script(module)


@contextmanager
def threads(count: int) -> Iterator[None]:
    previous = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(previous)


class TestDeterminism:
    @each(OPS, LAYERS, MODELS)
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    def test_repeats_bit_by_bit(self, case: Case, dtype: torch.dtype) -> None:
        """In the mode that raises for what is not deterministic, and on as many threads."""
        module, x = case.make(training=True)
        module, x = module.to(dtype), x.to(dtype)
        state = copy.deepcopy(module.state_dict())
        runs = []
        torch.use_deterministic_algorithms(True)
        try:
            with threads(2):
                for _ in range(3):
                    module.load_state_dict(state)
                    runs.append([t.clone() for t in (*step(module, x), *module.buffers())])
        finally:
            torch.use_deterministic_algorithms(False)
        for other in runs[1:]:
            assert all(torch.equal(a, b) for a, b in zip(runs[0], other, strict=True))

    @each(OPS, LAYERS, MODELS)
    def test_threads_of_python(self, case: Case) -> None:
        """Four that share a module in evaluation, as servers do, and give all the same bits."""
        module, x = case.make()
        with torch.no_grad():
            expected = module(x)
        outputs: list[list[Tensor]] = [[] for _ in range(4)]

        def serve(found: list[Tensor]) -> None:
            # A new thread has gradients on, whatever the one that made it.
            with torch.no_grad():
                found.extend(module(x) for _ in range(5))

        workers = [threading.Thread(target=serve, args=(found,)) for found in outputs]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join(60)
        assert [len(found) for found in outputs] == [5] * 4
        assert all(torch.equal(out, expected) for found in outputs for out in found)


class TestOptimizers:
    @each(LAYERS, MODELS)
    @pytest.mark.parametrize("option", ["foreach", "fused"])
    def test_adamw(self, case: Case, option: str) -> None:
        """Both need gradients of the parameters' dtype and device; fused also their layout."""
        module, x = case.make(training=True)
        # In float32 the rounding of gradients that are zero, as that of the keys' bias, is a step.
        module, x = module.double(), x.double()
        twin = copy.deepcopy(module)
        ours = torch.optim.AdamW(module.parameters(), lr=0.01, **{option: True})
        plain = torch.optim.AdamW(twin.parameters(), lr=0.01, foreach=False)
        for _ in range(2):
            step(module, x)
            step(twin, x)
            for parameter in module.parameters():
                assert parameter.grad.stride() == parameter.stride()
            ours.step()
            plain.step()
        assert_same(list(module.parameters()), list(twin.parameters()), rtol=1e-6)

    @each(LAYERS, MODELS)
    @pytest.mark.parametrize("average", [None, get_ema_multi_avg_fn(0.9)], ids=["swa", "ema"])
    def test_averages(self, case: Case, average: Any) -> None:
        module, x = case.make()
        averaged = AveragedModel(module, multi_avg_fn=average, use_buffers=average is not None)
        first = [p.detach().clone() for p in module.parameters()]
        averaged.update_parameters(module)
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.mul_(2)
        averaged.update_parameters(module)
        share = 0.5 if average is None else 0.1
        expected = [p + share * p for p in first]
        assert_same(list(averaged.module.parameters()), expected)
        assert averaged(x).shape == module(x).shape

    @each(LAYERS, MODELS)
    def test_norms_and_vectors(self, case: Case) -> None:
        module, x = case.make(training=True)
        step(module, x)
        grads = torch.cat([p.grad.flatten() for p in module.parameters()])
        norm = nn.utils.clip_grad_norm_(module.parameters(), 0.1)
        torch.testing.assert_close(norm, grads.norm())
        clipped = torch.cat([p.grad.flatten() for p in module.parameters()])
        torch.testing.assert_close(clipped.norm(), torch.tensor(0.1), rtol=1e-3, atol=0)

        module.eval()
        expected = module(x)
        vector = nn.utils.parameters_to_vector(module.parameters())
        nn.utils.vector_to_parameters(torch.zeros_like(vector), module.parameters())
        assert not torch.allclose(module(x), expected)
        nn.utils.vector_to_parameters(vector, module.parameters())
        assert torch.equal(module(x), expected)

    @each(LAYERS, MODELS)
    def test_gradients_set_to_zero_or_none(self, case: Case) -> None:
        module, x = case.make()
        expected = step(module, x)[1:]
        for set_to_none in (False, True):
            module.zero_grad(set_to_none=set_to_none)
            module(x).square().sum().backward()
            assert_same([p.grad for p in module.parameters()], expected)

    @each(LAYERS, MODELS)
    def test_post_accumulate_hooks(self, case: Case) -> None:
        """An optimizer within the backward."""
        module, x = case.make(training=True)
        seen = []
        for name, parameter in module.named_parameters():
            parameter.register_post_accumulate_grad_hook(lambda p, name=name: seen.append(name))
        step(module, x)
        assert sorted(seen) == sorted(name for name, _ in module.named_parameters())

# SPDX-License-Identifier: Apache-2.0
"""The layers as citizens of PyTorch: copies, dtypes, devices, hooks, checkpointing, backends."""

from __future__ import annotations

import copy
import io
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fastvit
from fastvit import GPSA, MHSA, ConvStem, PatchEmbed
from fastvit.functional import gpsa_attention
from fastvit.testing import assert_agreement


class Case(NamedTuple):
    build: Callable[..., nn.Module]
    shape: tuple[int, ...]
    #: Children that the layer runs, so their hooks must fire.
    children: tuple[str, ...]


CASES = {
    "GPSA": Case(
        lambda **kw: GPSA(24, 4, qkv_bias=True, grid_size=(2, 8), **kw), (2, 16, 24),
        ("qk", "v", "attn_drop", "proj", "proj_drop"),
    ),
    "MHSA": Case(
        lambda **kw: MHSA(24, 4, **kw), (2, 17, 24), ("qkv", "attn_drop", "proj", "proj_drop")
    ),
    "ConvStem": Case(
        lambda **kw: ConvStem(3, (4, 6), (2, 2), 5, **kw), (2, 3, 16, 16),
        ("0.conv", "0.bn", "1.conv", "1.bn", "2.conv"),
    ),
    "PatchEmbed": Case(
        lambda **kw: PatchEmbed(16, 8, embed_dim=6, norm_layer=nn.LayerNorm, **kw), (2, 3, 16, 16),
        ("proj", "norm"),
    ),
}  # fmt: skip


@pytest.fixture(params=CASES)
def case(request) -> Case:
    return CASES[request.param]


def example(case: Case, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    return case.build(dtype=dtype), torch.randn(case.shape).to(dtype)


class TestCopies:
    @pytest.mark.parametrize(
        "duplicate",
        [
            pytest.param(copy.deepcopy, id="deepcopy"),
            pytest.param(lambda m: pickle.loads(pickle.dumps(m)), id="pickle"),
        ],
    )
    @pytest.mark.parametrize("when", ["new", "used"])
    def test_are_independent_and_equal(self, case, duplicate, when):
        module, x = example(case)
        if when == "used":
            module(x).sum().backward()
        twin = duplicate(module)
        assert type(twin) is type(module)
        assert str(twin) == str(module)
        module.eval()
        expected = module(x)
        assert torch.equal(twin.eval()(x), expected)
        with torch.no_grad():
            for parameter in twin.parameters():
                parameter.add_(1)
        assert torch.equal(module(x), expected)

    def test_torch_save(self, case):
        module, x = example(case)
        buffer = io.BytesIO()
        torch.save(module, buffer)
        buffer.seek(0)
        twin = torch.load(buffer, weights_only=False)
        assert torch.equal(twin.eval()(x), module.eval()(x))

    def test_state_dict_round_trip(self, case):
        """What is stored is parameters and norms' statistics: ``weights_only`` reads it."""
        module, x = example(case)
        module(x)
        buffer = io.BytesIO()
        torch.save(module.state_dict(), buffer)
        buffer.seek(0)
        torch.manual_seed(1)
        twin = case.build()
        assert not torch.equal(twin.eval()(x), module.eval()(x))
        twin.load_state_dict(torch.load(buffer, weights_only=True), strict=True)
        assert torch.equal(twin(x), module(x))

    def test_backend_and_options_survive(self):
        module = copy.deepcopy(GPSA(24, 4, grid_size=(2, 8), backend="native"))
        with pytest.raises(RuntimeError, match="native"):
            module(torch.randn(1, 16, 24))
        stem = pickle.loads(
            pickle.dumps(ConvStem(3, (4,), (2,), 5, mean=(0.5,) * 3, std=(0.1,) * 3))
        )
        plain = ConvStem(3, (4,), (2,), 5)
        plain.load_state_dict(stem.state_dict())
        images = torch.full((1, 3, 8, 8), 255, dtype=torch.uint8)
        torch.testing.assert_close(stem.eval()(images), plain.eval()(torch.full(images.shape, 5.0)))

    def test_repr_shows_what_matters(self):
        assert "grid_size=(2, 8)" in repr(GPSA(24, 4, grid_size=(2, 8)))


class TestConversions:
    @pytest.mark.parametrize(
        ("convert", "dtype"),
        [
            (nn.Module.half, torch.float16),
            (nn.Module.bfloat16, torch.bfloat16),
            (nn.Module.double, torch.float64),
        ],
        ids=["half", "bfloat16", "double"],
    )
    def test_dtype(self, case, convert, dtype):
        """Parameters and statistics rounded, then the arithmetic in that dtype."""
        module, x = example(case)
        module = convert(module.eval())
        x = x.to(dtype)
        out = module(x)
        assert out.dtype == dtype
        assert all(p.dtype == dtype for p in module.parameters())
        with fastvit.backend("reference"):
            expected = copy.deepcopy(module).double()(x.double())
            assert_agreement(out, module(x), expected, floor=1e-12)
        out.sum().backward()
        assert all(p.grad.dtype == dtype for p in module.parameters() if p.grad is not None)

    def test_built_on_meta_then_loaded(self, case):
        source, x = example(case)
        module = case.build(device="meta")
        assert all(t.is_meta for t in module.state_dict().values())
        module = module.to_empty(device="cpu")
        module.load_state_dict(source.state_dict(), strict=True)
        assert torch.equal(module.eval()(x), source.eval()(x))

    def test_loaded_by_assignment(self, case):
        """Nothing is kept of the meta tensors, in buffers or elsewhere."""
        source, x = example(case)
        module = case.build(device="meta")
        module.load_state_dict(source.state_dict(), strict=True, assign=True)
        assert torch.equal(module.eval()(x), source.eval()(x))

    @pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
    def test_shapes_on_meta(self, case, training):
        module, x = example(case)
        meta = case.build(device="meta").train(training)
        out = meta(x.to("meta"))
        expected = module.train(training)(x)
        assert out.is_meta
        assert (out.shape, out.dtype, out.stride()) == (
            expected.shape, expected.dtype, expected.stride()
        )  # fmt: skip

    def test_dtype_of_construction(self, case):
        module, x = example(case, torch.bfloat16)
        assert all(p.dtype == torch.bfloat16 for p in module.parameters())
        assert module(x).dtype == torch.bfloat16

    def test_data_that_changes_in_place_counts(self, case):
        """Nothing derived from a parameter outlives the call; ``.data`` moves no version."""
        module, x = example(case)
        module.eval()
        module(x)
        for i, parameter in enumerate(module.parameters()):
            parameter.data.mul_(1.5).add_(0.1 * i)
        fresh = case.build()
        fresh.load_state_dict(module.state_dict())
        assert torch.equal(module(x), fresh.eval()(x))


class Adapter(nn.Module):
    """Twice what the wrapped layer gives."""

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return 2 * self.base_layer(x)


class AdapterWithWeight(Adapter):
    def __getattr__(self, name: str) -> object:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.base_layer, name)


class TestHooks:
    @pytest.mark.parametrize("backend", ["reference", "torch", None])
    @pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
    @pytest.mark.parametrize(
        ("name", "child"), [(n, child) for n, c in CASES.items() for child in c.children]
    )
    def test_on_children_fire(self, name, child, training, backend):
        module, x = example(CASES[name])
        module.train(training)
        seen = []
        module.get_submodule(child).register_forward_hook(lambda m, i, o: seen.append(o.shape))
        with fastvit.backend(backend or "auto"):
            module(x)
        assert len(seen) == 1

    def test_on_the_attention_dropout_sees_the_map(self):
        """What attention visualisers hang a hook on."""
        for name, tokens in (("GPSA", 16), ("MHSA", 17)):
            module, x = example(CASES[name])
            seen = []
            module.attn_drop.register_forward_hook(lambda m, i, o, seen=seen: seen.append(o))
            out = module.eval()(x)
            (attention,) = seen
            assert attention.shape == (2, 4, tokens, tokens)
            torch.testing.assert_close(attention, module.get_attention(x))
            module.attn_drop._forward_hooks.clear()
            torch.testing.assert_close(module(x), out)

    @pytest.mark.parametrize(
        ("name", "child"),
        [("GPSA", "attn_drop"), ("MHSA", "attn_drop"), ("GPSA", "v"), ("ConvStem", "0.bn"),
         ("ConvStem", "1.conv"), ("PatchEmbed", "proj")],
    )  # fmt: skip
    def test_that_change_the_output_count(self, name, child):
        module, x = example(CASES[name])
        module.eval()
        before = module(x)
        handle = module.get_submodule(child).register_forward_hook(lambda m, i, o: o * 0)
        assert not torch.allclose(module(x), before)
        handle.remove()
        assert torch.equal(module(x), before)

    def test_pre_hooks_and_backward_hooks_on_children_fire(self, case):
        for child in case.children:
            module, x = example(case)
            seen = []
            sub = module.get_submodule(child)
            sub.register_forward_pre_hook(lambda m, i, seen=seen: seen.append("pre"))
            sub.register_full_backward_hook(lambda m, i, o, seen=seen: seen.append("backward"))
            module(x.requires_grad_()).sum().backward()
            assert seen == ["pre", "backward"], child

    @pytest.mark.parametrize("adapter", ["bare", "with_weight"])
    @pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
    @pytest.mark.parametrize(
        ("name", "child"),
        [("GPSA", "qk"), ("MHSA", "qkv"), ("ConvStem", "1.conv"),
         ("ConvStem", "2.conv"), ("ConvStem", "0.bn"), ("PatchEmbed", "proj")],
    )  # fmt: skip
    def test_replaced_children_run(self, name, child, training, adapter):
        """As LoRA and quantisation replace them; peft's layers show the weight they wrap."""
        module, x = example(CASES[name])
        module.train(training)
        wrapper = (Adapter if adapter == "bare" else AdapterWithWeight)(module.get_submodule(child))
        module.set_submodule(child, wrapper)
        module(x)
        assert wrapper.calls == 1

    @pytest.mark.parametrize("layer", ["GPSA", "MHSA"])
    @pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
    def test_replaced_dropouts_run(self, layer, training):
        """Visualisers put a module there that keeps the map; others remove it."""
        module, x = example(CASES[layer])
        module.train(training)
        expected = module(x)
        module.attn_drop = module.proj_drop = nn.Identity()
        torch.testing.assert_close(module(x), expected)
        module.attn_drop = Adapter(nn.Identity())
        module.proj.bias.data.zero_()
        doubled = module(x)
        module.attn_drop = nn.Dropout(0.0)
        torch.testing.assert_close(doubled, 2 * module(x))

    def test_replaced_projection_gives_what_it_says(self):
        module, x = example(CASES["PatchEmbed"])
        module.norm = nn.Identity()
        expected = module(x)
        module.proj = AdapterWithWeight(module.proj)
        torch.testing.assert_close(module(x), 2 * expected)

    @pytest.mark.parametrize(
        ("name", "child"), [("GPSA", "v"), ("ConvStem", "1.conv"), ("PatchEmbed", "proj")]
    )
    def test_parametrised_weights_count(self, name, child):
        module, x = example(CASES[name])
        module.eval()

        class Doubled(nn.Module):
            def forward(self, weight: Tensor) -> Tensor:
                return 2 * weight

        twin = copy.deepcopy(module)
        twin.get_submodule(child).weight.data.mul_(2)
        nn.utils.parametrize.register_parametrization(
            module.get_submodule(child), "weight", Doubled()
        )
        torch.testing.assert_close(module(x), twin(x))


class TestModes:
    @pytest.mark.parametrize("guard", [torch.no_grad, torch.inference_mode], ids=str)
    @pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
    def test_without_gradients(self, case, guard, training):
        module, x = example(case)
        twin = copy.deepcopy(module)
        expected = module.train(training)(x)
        with guard():
            out = twin.train(training)(x)
        assert not out.requires_grad
        torch.testing.assert_close(out, expected)
        for (name, a), b in zip(twin.named_buffers(), module.buffers(), strict=True):
            torch.testing.assert_close(a, b, msg=name)

    @pytest.mark.parametrize("reentrant", [True, False])
    def test_activation_checkpointing(self, case, reentrant):
        module, x = example(case, torch.float64)
        twin = copy.deepcopy(module)
        x.requires_grad_()
        module(x).square().sum().backward()
        expected, x.grad = x.grad, None
        checkpoint(twin, x, use_reentrant=reentrant).square().sum().backward()
        torch.testing.assert_close(x.grad, expected)
        for (name, a), b in zip(twin.named_parameters(), module.parameters(), strict=True):
            torch.testing.assert_close(a.grad, b.grad, msg=name)

    @pytest.mark.parametrize("layer", [GPSA, MHSA])
    def test_checkpointing_replays_the_dropout(self, layer):
        module = layer(24, 4, attn_drop=0.5, proj_drop=0.5)
        x = torch.randn(2, 16, 24, requires_grad=True)
        torch.manual_seed(3)
        module(x).square().sum().backward()
        expected, x.grad = x.grad, None
        torch.manual_seed(3)
        checkpoint(module, x, use_reentrant=False).square().sum().backward()
        torch.testing.assert_close(x.grad, expected)

    def test_deterministic_algorithms(self, case):
        """Also filling new memory, which that mode does, must not change anything."""
        module, x = example(case)
        module.eval()
        expected = module(x)
        torch.use_deterministic_algorithms(True)
        try:
            out = module(x)
            out.sum().backward()
        finally:
            torch.use_deterministic_algorithms(False)
        torch.testing.assert_close(out, expected)

    def test_accumulates_gradients(self, case):
        module, x = example(case, torch.float64)
        module.eval()
        module(x).square().sum().backward()
        once = {n: p.grad.clone() for n, p in module.named_parameters()}
        module(x).square().sum().backward()
        for name, parameter in module.named_parameters():
            torch.testing.assert_close(parameter.grad, 2 * once[name], msg=name)

    def test_used_twice_in_one_graph(self, case):
        module, x = example(case, torch.float64)
        module.eval()
        other = x.flip(0)
        (module(x).square() + module(other).square()).sum().backward()
        both = {n: p.grad.clone() for n, p in module.named_parameters()}
        module.zero_grad()
        module(torch.cat([x, other])).square().sum().backward()
        for name, parameter in module.named_parameters():
            torch.testing.assert_close(parameter.grad, both[name], msg=name)

    def test_input_changed_after_the_forward_is_noticed(self, case):
        """Autograd's version check covers what the backward needs."""
        module, x = example(case)
        leaf = x.requires_grad_()
        inside = leaf * 1
        out = module(inside)
        inside.mul_(2)
        with pytest.raises(RuntimeError, match="inplace operation"):
            out.sum().backward()


def run_gpsa(**options) -> Tensor:
    q = torch.randn(1, 2, 4, 8)
    return gpsa_attention(q, q, q, torch.randn(2, 3), torch.randn(2), (2, 2), **options)


# Which backend runs shows in what it refuses: native has no GPSA at all, torch has no dropout, the
# reference has both.
def runs_on_reference() -> bool:
    try:
        run_gpsa(dropout_p=0.5)
    except RuntimeError as error:
        if "dropout" not in str(error):
            raise
        return False
    return True


@pytest.mark.usefixtures("auto_backend")
class TestBackendChoice:
    def test_context_manager_nests_and_restores(self):
        with fastvit.backend("reference"):
            with fastvit.backend("torch"):
                assert not runs_on_reference()
            assert runs_on_reference()
            with fastvit.backend("native"), pytest.raises(RuntimeError, match="native"):
                run_gpsa()
            assert runs_on_reference()

    def test_context_manager_restores_after_an_error(self):
        with fastvit.backend("torch"):
            with pytest.raises(KeyError), fastvit.backend("native"):
                raise KeyError
            assert not runs_on_reference()

    def test_set_inside_a_context_ends_with_it(self):
        with fastvit.backend("torch"):
            with fastvit.backend("reference"):
                fastvit.set_backend("native")
            assert not runs_on_reference()

    def test_set_backend_lasts(self):
        fastvit.set_backend("torch")
        assert not runs_on_reference()
        fastvit.set_backend("auto")
        assert runs_on_reference()

    def test_argument_over_default(self):
        fastvit.set_backend("native")
        assert torch.equal(run_gpsa(backend="torch").isfinite().all(), torch.tensor(True))
        GPSA(24, 4, backend="torch")(torch.randn(1, 16, 24))

    def test_module_without_one_follows_the_default(self):
        module = GPSA(24, 4)
        with fastvit.backend("native"), pytest.raises(RuntimeError, match="native"):
            module(torch.randn(1, 16, 24))
        module(torch.randn(1, 16, 24))

    def test_backward_keeps_the_backend_of_its_forward(self):
        q = torch.randn(1, 2, 4, 8, requires_grad=True)
        with fastvit.backend("torch"):
            out = gpsa_attention(q, q, q, torch.randn(2, 3), torch.randn(2), (2, 2))
        with fastvit.backend("native"):
            out.sum().backward()
        assert q.grad.isfinite().all()

    def test_auto_can_be_named(self):
        run_gpsa(backend="auto")
        run_gpsa(backend="auto", dropout_p=0.5)


class TestEnvironment:
    """``FASTVIT_BACKEND`` is the default of a process at its start."""

    CALL = (
        "import torch, fastvit; q = torch.randn(1, 2, 4, 8); "
        "fastvit.functional.gpsa_attention("
        "q, q, q, torch.randn(2, 3), torch.randn(2), (2, 2), dropout_p=0.5); print('ran')"
    )

    def run(self, tmp_path, backend: str) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "FASTVIT_BACKEND": backend}
        # Elsewhere, so that the clone's root does not come before the installed package.
        return subprocess.run(
            [sys.executable, "-c", self.CALL],
            env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=120,
        )  # fmt: skip

    def test_runs(self, tmp_path):
        result = self.run(tmp_path, "reference")
        assert result.returncode == 0, result.stderr
        assert result.stdout == "ran\n"

    @pytest.mark.parametrize(
        ("backend", "words"),
        [
            pytest.param("torch", ["torch", "dropout"], id="torch_has_no_dropout"),
            pytest.param("native", ["native"], id="native_has_no_gpsa"),
            pytest.param("refrence", ["FASTVIT_BACKEND", "refrence", "reference"], id="unknown"),
        ],
    )
    def test_refuses(self, tmp_path, backend, words):
        result = self.run(tmp_path, backend)
        assert result.returncode == 1
        assert all(word in result.stderr for word in words), result.stderr

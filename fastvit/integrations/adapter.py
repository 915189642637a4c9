# SPDX-License-Identifier: Apache-2.0
"""What all adapters have in common."""

from __future__ import annotations

import weakref
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from fastvit.layers.tracing import Leaf
from fastvit.ops.backend import Call, requested
from fastvit.ops.library import plain_ops_wanted


class Setting(NamedTuple):
    """What :func:`fastvit.accelerate` was asked for; every adapted module carries it."""

    #: None follows :func:`fastvit.set_backend`.
    backend: str | None
    #: "train" or "infer".
    mode: str


class Frozen(NamedTuple):
    """In mode "infer", what was made of parameters and buffers, and those with their versions."""

    made: Any
    sources: tuple[tuple[Tensor, int], ...]

    @classmethod
    def of(cls, made: Any, *sources: Tensor) -> Frozen:
        return cls(made, tuple((x, _version(x)) for x in sources))

    def get(self, *sources: Tensor) -> Any:
        """What was made.

        Raises:
            RuntimeError: the sources are others now, or were changed in place.
        """
        if not torch.compiler.is_compiling():
            kept = self.sources
            if len(kept) != len(sources) or not all(
                x is y and version == _version(x)
                for x, (y, version) in zip(sources, kept, strict=True)
            ):
                raise RuntimeError(
                    "accelerated with mode='infer', a snapshot of parameters that have changed "
                    "since: fastvit.restore(model), and accelerate it again"
                )
        return self.made


def _version(x: Tensor) -> int:
    return 0 if x.is_inference() else x._version


class Accelerated(Leaf, nn.Module):
    """Base of the adapters. Classes of modules are made from it by :func:`adapted_class`, so that
    ``super().forward`` is the library's own. Names begin with an underscore, since a child of the
    library's module may have any other.
    """

    #: The kind of layer, as in the argument ``layers`` of :func:`fastvit.accelerate`.
    _layer: ClassVar[str]
    #: What the class of a module was made of: an adapter, and the library's class.
    _mixin: ClassVar[type[Accelerated]]
    _original: ClassVar[type[nn.Module]]

    _fastvit: Setting

    @classmethod
    def _refusal(cls, module: nn.Module) -> str | None:
        """Why a module of the right class cannot be served, or None."""
        return None

    @classmethod
    def _call(cls, module: Any) -> Call:
        """What the choice of a backend for the module depends on."""
        first = next(p for p in module.parameters() if p.is_floating_point())
        return Call(cls._layer, first.device, first.dtype)

    @property
    def _backend(self) -> str | None:
        return self._fastvit.backend

    def _serves(self, x: object, ndim: int) -> bool:
        """Whether the fused op may run: not under ``torch.fx``, whose proxies it would refuse, nor
        on what the library's own forward has to complain of.
        """
        if not (isinstance(x, Tensor) and x.ndim == ndim and x.is_floating_point()):
            return False
        self._refuse_gradients(x)
        # A trace of plain operators is best the library's own.
        return requested(self._fastvit.backend) != "reference" and not plain_ops_wanted()

    @classmethod
    def _announce(cls, adapted: type[nn.Module], original: type[nn.Module]) -> None:
        """Tell the library of the new class, where it has to know."""

    @classmethod
    def _freeze(cls, module: Any) -> Frozen | None:
        """What derives from the parameters and is worth keeping, or None."""
        return None

    def _set(self, setting: Setting) -> None:
        frozen = None
        if setting.mode == "infer":
            with torch.no_grad():
                frozen = self._freeze(self)
        self.__dict__.update(_fastvit=setting, _fastvit_frozen=frozen)

    def _replicate_for_data_parallel(self) -> Any:
        """For DataParallel: the snapshot is on one device, and other caches are of the original."""
        replica = super()._replicate_for_data_parallel()
        replica.__dict__.pop("_fastvit_parts", None)
        replica.__dict__["_fastvit_frozen"] = None
        return replica

    def _refuse_gradients(self, x: Tensor) -> None:
        """In mode "infer", raise RuntimeError if a gradient would be asked for."""
        if self._fastvit.mode != "infer" or not torch.is_grad_enabled():
            return
        if x.requires_grad or any(p.requires_grad for p in self.parameters()):
            raise RuntimeError(
                "accelerated with mode='infer', which gives no gradients: run under "
                "torch.inference_mode() or torch.no_grad(), or call fastvit.restore(model)"
            )

    def train(self, mode: bool = True) -> Accelerated:
        """Refuses to train in mode "infer"."""
        if mode and self._fastvit.mode == "infer":
            raise RuntimeError(
                "accelerated with mode='infer', which cannot train: fastvit.restore(model) first"
            )
        return super().train(mode)

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        """Another device or dtype: what was frozen follows."""
        applied = super()._apply(*args, **kwargs)
        self._set(self._fastvit)
        return applied

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        if self._fastvit.mode == "infer":
            raise RuntimeError(
                "accelerated with mode='infer', a snapshot of the parameters: "
                "fastvit.restore(model) before loading others"
            )
        super()._load_from_state_dict(*args, **kwargs)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickle by the two classes that this one was made of, which both have names."""
        reduced: Any = super().__reduce_ex__(protocol)
        _, _, state, *rest = reduced
        made_again = ("_fastvit_frozen", "_fastvit_parts")
        state = {k: v for k, v in state.items() if k not in made_again}
        return _new, (self._mixin, self._original), state, *rest

    def __setstate__(self, state: Any) -> None:
        super().__setstate__(state)
        self._set(self._fastvit)


def swap(module: nn.Module, mixin: type[Accelerated], setting: Setting, call: object) -> None:
    """Give a module of a library's class the adapter, or an adapted one another setting.

    ``call`` stands for the call of :func:`fastvit.accelerate`, which may be undone before or after
    others.
    """
    if setting.mode == "infer" and any(part.training for part in module.modules()):
        raise ValueError("mode: 'infer' expects a model in eval(), got one in train()")
    original = module._original if isinstance(module, Accelerated) else type(module)
    calls = {**module.__dict__.get("_fastvit_calls", {}), call: setting}
    adapted = adapted_class(mixin, original)
    module.__class__ = adapted
    module.__dict__["_fastvit_calls"] = calls
    module._set(setting)  # type: ignore[operator]


def check_uncovered(module: Accelerated, name: str = "") -> None:
    """Raise RuntimeError if another class was put over that of :func:`swap`."""
    if "_original" not in type(module).__dict__:
        raise RuntimeError(
            f"restore: expected the class that accelerate gave to {name or 'a layer'}, got "
            f"{type(module).__qualname__}, which was put over it since"
        )


def put_back(module: nn.Module, *calls: object) -> None:
    """Undo :func:`swap` for some calls, or for all if none is named."""
    if not isinstance(module, Accelerated):
        return
    check_uncovered(module)
    kept = module.__dict__
    left = {c: s for c, s in kept["_fastvit_calls"].items() if calls and c not in calls}
    if left:
        kept["_fastvit_calls"] = left
        module._set(next(reversed(left.values())))
        return
    module.__class__ = module._original  # type: ignore[assignment]
    for name in [name for name in kept if name.startswith("_fastvit")]:
        del kept[name]


class Undo:
    """What undoes one call of :func:`fastvit.accelerate`; it does not keep the model alive."""

    def __init__(self, modules: list[nn.Module], call: object) -> None:
        self._modules = [weakref.ref(module) for module in modules]
        self._call = call

    def __call__(self) -> None:
        modules = [module for ref in self._modules if isinstance(module := ref(), Accelerated)]
        for module in modules:
            check_uncovered(module)
        for module in modules:
            put_back(module, self._call)


#: The classes that were made, by the two that they were made of.
_made: dict[tuple[type[nn.Module], type[nn.Module]], type[Any]] = {}


def adapted_class(mixin: type[Accelerated], original: type[nn.Module]) -> type[Any]:
    """The class of a module of ``original`` that ``mixin`` serves."""
    key = mixin, original
    if key not in _made:
        members = {
            # Of the library, by which torch.fx knows what it need not trace.
            "__module__": original.__module__,
            "__doc__": f"{original.__qualname__} of {original.__module__}, on fastvit's ops.",
            "_mixin": mixin,
            "_original": original,
        }
        _made[key] = type(f"Accelerated{original.__name__}", (mixin, original), members)
        mixin._announce(_made[key], original)
    return _made[key]


def _new(mixin: type[Accelerated], original: type[nn.Module]) -> Any:
    adapted = adapted_class(mixin, original)
    return nn.Module.__new__(adapted)

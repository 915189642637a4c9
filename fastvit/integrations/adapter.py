# SPDX-License-Identifier: Apache-2.0
"""What all adapters have in common."""

from __future__ import annotations

from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from fastvit.ops.backend import Call, requested
from fastvit.ops.library import plain_ops_wanted


class Setting(NamedTuple):
    """What :func:`fastvit.accelerate` was asked for; every adapted module carries it."""

    #: None follows :func:`fastvit.set_backend`.
    backend: str | None
    #: "train" or "infer".
    mode: str
    #: In mode "infer", what was made of the parameters; None where that would gain nothing.
    frozen: Any = None


class Accelerated(nn.Module):
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
    def _freeze(cls, module: Any) -> Any:
        """What derives from the parameters and is worth keeping, or None."""
        return None

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
        if self._fastvit.frozen is not None:
            self.__dict__["_fastvit"] = self._fastvit._replace(frozen=self._freeze(self))
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
        _, _, *state = super().__reduce_ex__(protocol)  # type: ignore[str-unpack]
        return _new, (self._mixin, self._original), *state


def swap(module: nn.Module, mixin: type[Accelerated], setting: Setting, call: object) -> None:
    """Give a module of a library's class the adapter, or an adapted one another setting.

    ``call`` stands for the call of :func:`fastvit.accelerate`, which may be undone before or after
    others.
    """
    if setting.mode == "infer":
        if module.training:
            raise ValueError("mode: 'infer' expects a model in eval(), got one in train()")
        setting = setting._replace(frozen=mixin._freeze(module))
    original = module._original if isinstance(module, Accelerated) else type(module)
    calls = {**module.__dict__.get("_fastvit_calls", {}), call: setting}
    adapted = adapted_class(mixin, original)
    module.__class__ = adapted
    module.__dict__.update(_fastvit=setting, _fastvit_calls=calls)


def put_back(module: nn.Module, *calls: object) -> None:
    """Undo :func:`swap` for some calls, or for all if none is named."""
    if not isinstance(module, Accelerated):
        return
    kept = module.__dict__
    left = {c: s for c, s in kept["_fastvit_calls"].items() if calls and c not in calls}
    if left:
        kept.update(_fastvit=next(reversed(left.values())), _fastvit_calls=left)
        return
    module.__class__ = module._original  # type: ignore[assignment]
    for name in [name for name in kept if name.startswith("_fastvit")]:
        del kept[name]


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

# SPDX-License-Identifier: Apache-2.0
"""What all adapters have in common."""

from __future__ import annotations

from typing import Any, ClassVar, NamedTuple

from torch import Tensor, nn

from fastvit.ops.backend import Call, requested


class Setting(NamedTuple):
    """What :func:`fastvit.accelerate` was asked for; every adapted module carries it."""

    #: None follows :func:`fastvit.set_backend`.
    backend: str | None
    #: "train" or "infer".
    mode: str


class Former(NamedTuple):
    """What a module was before :func:`swap`."""

    module: nn.Module
    kind: type[nn.Module]
    setting: Setting | None


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
        return (
            isinstance(x, Tensor)
            and x.ndim == ndim
            and x.is_floating_point()
            and requested(self._fastvit.backend) != "reference"
        )

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickle by the two classes that this one was made of, which both have names."""
        _, _, *state = super().__reduce_ex__(protocol)  # type: ignore[str-unpack]
        return _new, (self._mixin, self._original), *state


def former(module: nn.Module) -> Former:
    """The class and setting of a module, to put back."""
    return Former(module, type(module), module.__dict__.get("_fastvit"))


def swap(module: nn.Module, mixin: type[Accelerated], setting: Setting) -> None:
    """Give a module of a library's class the adapter, or an adapted one another setting."""
    if not isinstance(module, Accelerated):
        module.__class__ = adapted_class(mixin, type(module))
    module.__dict__["_fastvit"] = setting


def put_back(former: Former) -> None:
    """Undo :func:`swap`."""
    former.module.__class__ = former.kind
    kept = former.module.__dict__
    if former.setting is None:
        for name in [name for name in kept if name.startswith("_fastvit")]:
            del kept[name]
    else:
        kept["_fastvit"] = former.setting


#: The classes that were made, by the two that they were made of.
_made: dict[tuple[type[nn.Module], type[nn.Module]], type[Any]] = {}


def adapted_class(mixin: type[Accelerated], original: type[nn.Module]) -> type[Any]:
    """The class of a module of ``original`` that ``mixin`` serves."""
    key = mixin, original
    if key not in _made:
        members = {
            "__module__": mixin.__module__,
            "__doc__": f"{original.__qualname__} of {original.__module__}, on fastvit's ops.",
            "_mixin": mixin,
            "_original": original,
        }
        _made[key] = type(f"Accelerated{original.__name__}", (mixin, original), members)
    return _made[key]


def _new(mixin: type[Accelerated], original: type[nn.Module]) -> Any:
    adapted = adapted_class(mixin, original)
    return nn.Module.__new__(adapted)

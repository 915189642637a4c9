# SPDX-License-Identifier: Apache-2.0
"""Registration of the private ops ``torch.ops.fastvit._*`` and what every op needs around it.

The ops are opaque to tracing. An ``autograd.Function`` around each gives it its gradient, since
only that form passes ``torch.compile``, ``torch.func`` and ``vmap`` alike; an exported program
holds the bare op, which is given the same gradient by :func:`register_gradient`. Call the
functions of :mod:`fastvit.functional`, never a bare op.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from fastvit.ops.flops import Formula, count

_LIBRARY = torch.library.Library("fastvit", "DEF")

F = TypeVar("F", bound=Callable[..., Any])


def register(
    schema: str,
    fake: Callable[..., Any],
    *,
    direct: bool = False,
    random: bool = False,
    flops: Formula | None = None,
) -> Callable[[F], Any]:
    """Register the decorated function as the op of ``schema`` on every device.

    Args:
        schema: name, arguments and results, as ``torch.library`` takes them.
        fake: shapes, dtypes and strides of the results, from those of the arguments.
        direct: whether calls that nobody watches may go past the dispatcher, whose way back into
            Python costs 5 µs. For ops that change none of their arguments, and take no lists of
            tensors.
        random: whether it takes numbers from PyTorch's generator, so that no compiler calls it
            again for what it gave.
        flops: how many it takes, see :mod:`fastvit.ops.flops`; None for an op without products.

    Returns:
        A decorator that gives back the op as a callable.
    """
    name = schema.split("(", 1)[0]

    def decorate(implementation: F) -> Any:
        isolated = _isolated(implementation)
        tags = (torch.Tag.nondeterministic_seeded,) if random else ()
        _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag, *tags))
        _LIBRARY.impl(name, isolated, "CompositeExplicitAutograd")
        torch.library.register_fake(f"fastvit::{name}", fake, lib=_LIBRARY)
        if flops is not None:
            count(getattr(torch.ops.fastvit, name), flops)
        op = getattr(torch.ops.fastvit, name).default

        # Without the kernel of register_gradient, which costs 3 µs a call: the Function around
        # the op has done its work.
        def call(*args: Any) -> Any:
            if torch.compiler.is_compiling():
                return op(*args)
            with torch._C._AutoDispatchBelowAutograd():
                return (isolated if direct and _unwatched(args) else op)(*args)

        return call

    return decorate


def _unwatched(args: Sequence[Any]) -> bool:
    """Whether an op would do no more than call its implementation: the tensors, all on one device,
    are plain ones of a processor or a GPU, and no mode, transform, trace or profiler is there to
    see the op.
    """
    if (
        torch._C._len_torch_dispatch_stack() != 0
        or torch._C._len_torch_function_stack() != 0
        or torch._C._get_tracing_state() is not None
        or torch._C._autograd._profiler_enabled()
        or in_transform()
    ):
        return False
    for x in args:
        kind = type(x)
        if kind is Tensor or kind is torch.nn.Parameter:
            # The dispatcher resolves the lazy minus, and gives a zero without memory some.
            if x.is_neg() or x._is_zerotensor():
                return False
        elif isinstance(x, Tensor):
            return False
    return bool(args[0].is_cpu or args[0].is_cuda)


def register_gradient(
    name: str, backward: Callable[..., Any], setup_context: Callable[..., None]
) -> None:
    """Give the bare op ``name`` the gradient of the Function around it.

    Args:
        name: of the op, without its namespace.
        backward, setup_context: as of an ``autograd.Function`` whose arguments are the op's.
    """
    torch.library.register_autograd(
        f"fastvit::{name}", backward, setup_context=setup_context, lib=_LIBRARY
    )


def _isolated(implementation: F) -> F:
    """Run an implementation without gradients and without autocast.

    Autograd stays on inside an op written in PyTorch operators, and autocast would round what
    must stay float32; both are settled outside the op.
    """

    @functools.wraps(implementation)
    def wrapped(first: Tensor | Sequence[Tensor], *args: Any) -> Any:
        if torch.is_grad_enabled():
            # What torch.no_grad does, without its 1.4 µs.
            torch._C._set_grad_enabled(False)
            try:
                return wrapped(first, *args)
            finally:
                torch._C._set_grad_enabled(True)
        if not torch._C._is_any_autocast_enabled():
            return implementation(first, *args)
        device_type = (first if isinstance(first, Tensor) else first[0]).device.type
        if not autocast_enabled(device_type):
            return implementation(first, *args)
        with torch.autocast(device_type, enabled=False):
            return implementation(first, *args)

    return wrapped  # type: ignore[return-value]


def autocast_enabled(device_type: str) -> bool:
    """Whether autocast is on for a device type (asking for "meta" raises in PyTorch)."""
    return device_type in ("cuda", "cpu") and torch.is_autocast_enabled(device_type)


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """The dtype that autocast wants the matrix products of ``x`` in; None when it is off.

    float64 is left alone, as PyTorch's own autocast does.
    """
    if not torch.compiler.is_compiling() and not torch._C._is_any_autocast_enabled():
        return None
    device_type = x.device.type
    if x.dtype == torch.float64 or not autocast_enabled(device_type):
        return None
    return torch.get_autocast_dtype(device_type)


def plain_ops_wanted() -> bool:
    """Whether a trace must hold plain PyTorch ops only: ONNX export and ``torch.jit.trace``."""
    if torch._C._get_tracing_state() is not None:
        return True
    # An export traces or compiles; asking for it costs 1 µs.
    return torch.compiler.is_compiling() and torch.onnx.is_in_onnx_export()


def in_transform() -> bool:
    """Whether ``torch.func`` or forward-mode AD is at work, which only a Function may meet."""
    return (
        torch._C._are_functorch_transforms_active() or torch.autograd.forward_ad._current_level >= 0
    )


def differentiable(
    function: type[torch.autograd.Function],
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Pair a Function with the bare op that does the same when no gradient is asked for.

    The decorated function takes the Function's arguments and calls the op. The result calls it
    when nothing needs a gradient (2 µs instead of 5), otherwise an eager twin of the Function
    (``setup_context`` alone costs 10 µs a call), and the Function itself under a transform or a
    compiler.
    """

    class EagerTwin(function):  # type: ignore[misc, valid-type]
        @staticmethod
        def forward(ctx: Any, *args: Any) -> Any:
            output = _no_views(function.forward(*args))
            function.setup_context(ctx, args, output)
            return output

        setup_context = torch.autograd.Function.setup_context

    EagerTwin.__name__ = f"{function.__name__}Eager"

    def decorate(op: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(op)
        def call(*args: Any) -> Any:
            if torch.compiler.is_compiling():
                if not _needs_grad(args):
                    return op(*args)
                # A strict export would trace the Function without its gradient; the op within has
                # it by register_gradient.
                exporting = torch.compiler.is_exporting()
                return function.forward(*args) if exporting else function.apply(*args)
            if in_transform():
                return _apply(function, *args)
            return EagerTwin.apply(*args) if _needs_grad(args) else op(*args)

        return call

    return decorate


def _no_views(output: Any) -> Any:
    """What a Function returns must not be a view if callers are to change it in place. Before torch
    2.15 the result of ``linear`` on three dimensions is one.
    """
    if isinstance(output, tuple):
        return tuple(map(_no_views, output))
    return output.detach() if isinstance(output, Tensor) and output._is_view() else output


def _apply(function: type[torch.autograd.Function], *args: Any) -> Any:
    """Under a transform. A jvp of our own to say this in would keep Dynamo from the Function."""
    try:
        return function.apply(*args)
    except NotImplementedError as error:
        if "jvp" not in str(error):
            raise
        raise RuntimeError(
            "fastvit: forward-mode differentiation (torch.func.jvp, jacfwd and hessian) is only "
            "supported by backend='reference'; got a fused op"
        ) from error


class SingleBackward(torch.autograd.Function):
    """Base of the Functions that compute gradients: refuses to be differentiated in turn."""

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        raise RuntimeError(
            "fastvit: a gradient was differentiated again, which only backend='reference' "
            "supports; got a fused backward"
        )


def _needs_grad(args: Sequence[Any]) -> bool:
    return torch.is_grad_enabled() and any(isinstance(a, Tensor) and a.requires_grad for a in args)


def picked(wanted: Sequence[bool], results: Sequence[Tensor | None]) -> list[Tensor]:
    """The gradients that are wanted, which are the ones that an op returns."""
    return [cast(Tensor, r) for r, w in zip(results, wanted, strict=True) if w]


def masked(wanted: Sequence[bool], gradients: Sequence[Tensor]) -> tuple[Tensor | None, ...]:
    """Gradients in the places that asked for one, None in the others."""
    remaining = iter(gradients)
    return tuple(next(remaining) if w else None for w in wanted)


def loop_over_batch(
    function: Callable[..., Any], batch_size: int, in_dims: Sequence[int | None], args: Any
) -> tuple[Any, Any]:
    """The plain ``vmap`` rule: call once per sample and stack. Returns (outputs, out_dims)."""
    samples = []
    for i in range(batch_size):
        samples.append(
            function(
                *(
                    a.select(dim, i) if isinstance(a, Tensor) and dim is not None else a
                    for a, dim in zip(args, in_dims, strict=True)
                )
            )
        )
    if isinstance(samples[0], Tensor):
        return torch.stack(samples), 0
    stacked = tuple(
        None if parts[0] is None else torch.stack(parts) for parts in zip(*samples, strict=True)
    )
    return stacked, tuple(None if s is None else 0 for s in stacked)

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from fastvit import reference
from fastvit.functional import conv_stem
from fastvit.layers.children import is_plain
from fastvit.layers.documentation import with_backend
from fastvit.layers.tracing import Leaf, fx_node
from fastvit.ops.backend import checked, requested
from fastvit.ops.library import plain_ops_wanted
from fastvit.ops.tokens import wide
from fastvit.reference import ConvStage

#: A 3x3 convolution and its batch norm, which may be a SyncBatchNorm.
Stage = tuple[nn.Conv2d, nn.BatchNorm2d]


class ConvStem(Leaf, reference.ConvStem):
    __doc__ = f"""{with_backend(reference.ConvStem)}
Batch norms that ``torch.nn.SyncBatchNorm.convert_sync_batchnorm`` has converted share their
statistics in training, on processors too (where PyTorch's own module refuses, and
``DistributedDataParallel`` wants the conversion after the wrapping).
"""

    def __init__(
        self,
        in_chans: int = 3,
        channels: Sequence[int] = (48, 96, 192, 384),
        strides: Sequence[int] = (2, 2, 2, 2),
        embed_dim: int = 384,
        *,
        norm_eps: float = 1e-5,
        norm_momentum: float | None = 0.1,
        flatten: bool = True,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        backend: str | None = None,
    ) -> None:
        super().__init__(
            in_chans,
            channels,
            strides,
            embed_dim,
            norm_eps=norm_eps,
            norm_momentum=norm_momentum,
            flatten=flatten,
            mean=mean,
            std=std,
            device=device,
            dtype=dtype,
        )
        self.backend = None if backend is None else checked(backend)

    @classmethod
    def from_module(cls, module: nn.Module, **kwargs: Any) -> ConvStem:
        """A layer that shares the parameters and buffers of another library's ViT_C stem.

        Args:
            module: a ``ConvStem`` of ours or timm's, torchvision's ``conv_proj`` or any
                Sequential of 3x3 Conv2d (padding 1, no bias), BatchNorm2d (or SyncBatchNorm),
                ReLU, repeated, and a 1x1 Conv2d with bias. It keeps working.
            kwargs: ``flatten``, ``mean``, ``std`` and ``backend``.

        Raises:
            TypeError: ``module`` has another shape; the message says where.
        """
        stages, projection = stem_parts(module)
        convolutions, norms = zip(*stages, strict=True)
        layer = cls(
            convolutions[0].in_channels,
            [conv.out_channels for conv in convolutions],
            [conv.stride[0] for conv in convolutions],
            projection.out_channels,
            norm_eps=norms[0].eps,
            norm_momentum=norms[0].momentum,
            device="meta",
            **kwargs,
        )
        for stage, conv, norm in zip(layer.stages, convolutions, norms, strict=True):
            stage.conv = conv
            if isinstance(norm, nn.SyncBatchNorm):
                stage.bn = nn.SyncBatchNorm(  # type: ignore[assignment]
                    norm.num_features, process_group=norm.process_group, device="meta"
                )
            _share_norm(stage.bn, norm)
        layer.projection.conv = projection
        # Not by train(), which would wake frozen batch norms.
        for part in (layer, *layer):
            part.training = module.training
        return layer

    def _fusible(self) -> bool:
        *stages, projection = self
        return (
            all(is_plain(stage, reference.ConvBNReLU) for stage in stages)
            and is_plain(projection, reference.Projection)
            and is_fusible(self._layers(), self.projection.conv)
        )

    def _layers(self) -> list[Stage]:
        return [(stage.conv, stage.bn) for stage in self.stages]

    def forward(self, x: Tensor) -> Tensor:
        if (node := fx_node(self, x)) is not None:
            return node
        if requested(self.backend) == "reference" or not self._fusible() or plain_ops_wanted():
            return super().forward(x)
        stages = self._layers()
        raw = x.dtype == torch.uint8
        tokens = fused_conv_stem(
            stages,
            self.projection.conv,
            x,
            mean=self.mean if raw else None,
            std=self.std if raw else None,
            backend=self.backend,
        )
        if self.flatten:
            return tokens
        grids = reference.stage_grids(x.shape[-2:], [conv.stride[0] for conv, _ in stages])
        return tokens.transpose(1, 2).unflatten(2, grids[-1])


def is_fusible(
    stages: Sequence[Stage], projection: nn.Module, *norms: type[nn.BatchNorm2d]
) -> bool:
    """Whether the layers can run as one op: plain ones, and batch norms of one mind.

    Args:
        stages: the 3x3 convolutions and batch norms.
        projection: the last convolution.
        norms: classes of batch norms to accept besides PyTorch's.
    """
    if not is_plain(projection, nn.Conv2d) or not _has_usual_options(projection, 0):
        return False
    for conv, norm in stages:
        if not is_plain(conv, nn.Conv2d) or not _has_usual_options(conv, 1):
            return False
        if not is_plain(norm, *_NORMS, *norms):
            return False
        # PyTorch's may lack both, or the bias alone.
        if norm._parameters["weight"] is None or norm._parameters["bias"] is None:
            return False
    first, group = stages[0][1], _process_group(stages[0][1])
    tracked = first._buffers["running_mean"] is not None
    for _, norm in stages:
        if (norm.training, norm.eps, norm.momentum) != (first.training, first.eps, first.momentum):
            return False
        # Not as attributes, which takes ten times as long.
        buffers = norm._buffers
        if (buffers["running_mean"] is not None) != tracked or _process_group(norm) is not group:
            return False
        # Buffers that are not tracked are left alone, and so is a cumulative average uncounted.
        if tracked and not norm.track_running_stats:
            return False
        if tracked and norm.momentum is None and buffers["num_batches_tracked"] is None:
            return False
    return True


def fused_conv_stem(
    stages: Sequence[Stage],
    projection: nn.Conv2d,
    x: Tensor,
    **options: Any,
) -> Tensor:
    """Tokens (B, N[+1], D) of a stem of which :func:`is_fusible` holds, with what its batch norms
    do in training. ``options`` are those of :func:`fastvit.functional.conv_stem`.
    """
    norms = [norm for _, norm in stages]
    first = norms[0]
    tokens = conv_stem(
        x,
        [_stage(conv, norm) for conv, norm in stages],
        projection.weight,
        projection.bias,
        training=first.training,
        momentum=_momentum(norms),
        eps=first.eps,
        process_group=_process_group(first),
        **options,
    )
    if first.training:
        for norm in norms:
            if norm.num_batches_tracked is not None:
                norm.num_batches_tracked.add_(1)
    return tokens


def _has_usual_options(conv: Any, padding: int) -> bool:
    """Whether a convolution of a stem is what it was built as: options are plain attributes."""
    return (
        conv.padding == (padding, padding)
        and conv.stride in (((1, 1), (2, 2)) if padding else ((1, 1),))
        and conv.dilation == (1, 1)
        and conv.groups == 1
        and conv.padding_mode == "zeros"
    )


def _stage(conv: nn.Conv2d, norm: nn.BatchNorm2d) -> ConvStage:
    return ConvStage(
        conv.weight, norm.weight, norm.bias, norm.running_mean, norm.running_var, conv.stride[0]
    )


def _process_group(norm: nn.Module) -> torch.distributed.ProcessGroup | None:
    """The processes over which a batch norm takes its statistics now; None if it is this one."""
    if not isinstance(norm, nn.SyncBatchNorm) or not norm.training:
        return None
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return None
    group = norm.process_group
    if group is None:
        group = torch.distributed.group.WORLD
    return group if torch.distributed.get_world_size(group) > 1 else None


def _momentum(norms: Sequence[nn.BatchNorm2d]) -> float | Tensor:
    """The share of the next batch in running statistics; of a cumulative average (stages,), and
    known to the device only.
    """
    momentum, mean = norms[0].momentum, norms[0].running_mean
    if momentum is not None:
        return momentum
    if mean is None or not norms[0].training:
        return 0.0
    counts = torch.stack([cast(Tensor, norm.num_batches_tracked) for norm in norms]) + 1
    return counts.to(wide(mean.dtype)).reciprocal()


def _share_norm(target: nn.BatchNorm2d, source: nn.BatchNorm2d) -> None:
    """Give a plain batch norm the parameters and buffers of another, which may do more (timm's
    has the ReLU inside).
    """
    target.weight, target.bias = source.weight, source.bias
    target.eps, target.momentum = source.eps, source.momentum
    target.track_running_stats = source.track_running_stats
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        target.register_buffer(name, getattr(source, name))
    target.training = source.training


def stem_parts(
    module: nn.Module,
) -> tuple[list[Stage], nn.Conv2d]:
    """The stages (convolution, batch norm) of a ViT_C stem and its projection.

    Raises:
        TypeError: a layer is out of place, or has options that the stem does not have.
    """
    if isinstance(module, reference.ConvStem):
        return [(stage.conv, stage.bn) for stage in module.stages], module.projection.conv
    expected = "expected (3x3 Conv2d, BatchNorm2d, ReLU) stages and a 1x1 Conv2d with bias"
    for part in module.modules():
        if not _runs_in_order(part):
            kind = type(part).__qualname__
            raise TypeError(f"module: {expected}, got a {kind} with a forward of its own")
    layers = [m for m in module.modules() if isinstance(m, _STEM_LAYERS) or _is_foreign(m)]
    *body, projection = layers or [module]
    if not body or len(body) % 3:
        raise TypeError(f"module: {expected}, got {[type(m).__name__ for m in layers]}")
    stages: list[Any] = list(zip(*[iter(body)] * 3, strict=True))
    for i, (conv, norm, activation) in enumerate(stages):
        misfit = _misfit(conv, kernel_size=3, strides=(1, 2), bias=False)
        for layer, kinds in ((norm, _NORMS), (activation, (nn.ReLU,))):
            # Of a ReLU exactly: another forward is another activation.
            if not isinstance(layer, kinds) or (nn.ReLU in kinds and type(layer) is not nn.ReLU):
                misfit = misfit or f"a {type(layer).__name__} in the place of a {kinds[0].__name__}"
        # PyTorch's conversion keeps the ReLU of timm's batch norm, and runs it no more.
        if type(norm) in _NORMS and next(norm.children(), None) is not None:
            misfit = (
                misfit or f"an activation within a {type(norm).__name__}, which does not run it"
            )
        if not getattr(norm, "affine", True):
            misfit = misfit or "a batch norm with affine=False"
        if misfit:
            raise TypeError(f"module: {expected}, got in stage {i} {misfit}")
    misfit = _misfit(projection, kernel_size=1, strides=(1,), bias=True)
    if misfit:
        raise TypeError(f"module: {expected}, got at the end {misfit}")
    return [(conv, norm) for conv, norm, _ in stages], cast(nn.Conv2d, projection)


_NORMS = (nn.BatchNorm2d, nn.SyncBatchNorm)
_STEM_LAYERS = (nn.Conv2d, *_NORMS, nn.ReLU)


#: Containers of other libraries that run their children in the order in which they have them.
_CHAINS = (
    "timm.layers.conv_bn_act.ConvNormAct",
    "timm.layers.norm_act.BatchNormAct2d",
    "pycls.models.vit.ViTStemConv",
)


def _runs_in_order(module: nn.Module) -> bool:
    """Whether a module is a layer, or does nothing but run its children one after the other."""
    if next(module.children(), None) is None:
        return True
    kind = getattr(type(module), "_original", type(module))
    if kind.forward is nn.Sequential.forward and not module._parameters:
        return True
    # A batch norm that keeps an activation is looked at by itself.
    return f"{kind.__module__}.{kind.__qualname__}" in _CHAINS or kind in _NORMS


def _is_foreign(module: nn.Module) -> bool:
    """Whether a module computes something that the stem does not."""
    is_leaf = next(module.children(), None) is None
    return is_leaf and not isinstance(module, (nn.Identity, nn.Sequential))


def _misfit(conv: nn.Module, kernel_size: int, strides: Sequence[int], bias: bool) -> str | None:
    """What keeps a layer from being a convolution of the stem, or None."""
    if not isinstance(conv, nn.Conv2d):
        return f"a {type(conv).__name__} in the place of a Conv2d"
    expected: dict[str, list[Any]] = {
        "kernel_size": [(kernel_size, kernel_size)],
        "stride": [(stride, stride) for stride in strides],
        "padding": [(kernel_size // 2, kernel_size // 2)],
        "dilation": [(1, 1)],
        "groups": [1],
        "padding_mode": ["zeros"],
    }
    for option, values in expected.items():
        if getattr(conv, option) not in values:
            return f"{option}={getattr(conv, option)}"
    if (conv.bias is not None) != bias:
        return "no bias" if bias else "a bias"
    return None

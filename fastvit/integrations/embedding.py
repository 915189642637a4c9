# SPDX-License-Identifier: Apache-2.0
"""Adapters of patch embeddings, and of models that add class token and positions to them."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from fastvit.functional import patch_embed
from fastvit.integrations.adapter import Accelerated
from fastvit.layers.children import is_plain
from fastvit.ops.library import autocast_dtype


class Unembedded:
    """Images on their way through a model that adds class token and positions right after its
    embedding: the embedding hands them on, and the sum runs both as one op.

    To all else it is what it stands for, the images and, past the embedding, their tokens: somebody
    may have edited the model.
    """

    def __init__(self, images: Tensor, embedding: AcceleratedEmbedding | None = None) -> None:
        self._images = images
        self._embedding = embedding
        self._made: Tensor | None = None

    def through(self, embedding: AcceleratedEmbedding) -> Unembedded:
        """As the output of an embedding."""
        return Unembedded(self._images, embedding)

    def tokens(self, cls_token: Tensor | None, pos_embed: Tensor) -> Tensor:
        """(B, N[+1], D), in the dtype that a model gets by adding them itself."""
        assert self._embedding is not None
        return self._embedding._tokens(self._images, cls_token, pos_embed)

    def plain(self) -> Tensor:
        """What it stands for."""
        if self._embedding is None:
            return self._images
        if self._made is None:
            self._made = self._embedding._fused(self._images)
        return self._made

    def __add__(self, pos_embed: Any) -> Tensor:
        shape = pos_embed.shape if isinstance(pos_embed, Tensor) else ()
        # Of one token it could be a sum over all of them.
        is_positions = len(shape) == 3 and shape[0] == 1 and shape[1] > 1
        if self._embedding is None or self._made is not None or not is_positions:
            return self.plain() + pos_embed
        return self.tokens(None, pos_embed)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.plain(), name)

    @classmethod
    def __torch_function__(
        cls, function: Any, _types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        args, kwargs = tree_map(_plain, (args, kwargs or {}))
        return function(*args, **kwargs)


def _plain(x: Any) -> Any:
    return x.plain() if isinstance(x, Unembedded) else x


def _as_plain(name: str) -> Any:
    return lambda self, *args: getattr(self.plain(), name)(*map(_plain, args))


# Python looks operators up in the class.
for _name in (
    *("eq", "ne", "lt", "le", "gt", "ge", "bool", "contains", "getitem", "iter", "len"),
    *("mul", "rmul", "sub", "rsub", "radd", "truediv", "rtruediv", "matmul", "pow", "neg", "abs"),
):
    setattr(Unembedded, f"__{_name}__", _as_plain(f"__{_name}__"))


class AcceleratedEmbedding(Accelerated):
    """An embedding whose tokens the model may complete in the same op."""

    def _fused(self, images: Tensor, **token_parameters: Any) -> Tensor:
        """(B, N[+1], D)."""
        raise NotImplementedError

    def _fits(self, images: object) -> bool:
        """Whether the fused op may stand for the library's forward on these images."""
        raise NotImplementedError

    def _last_weight(self) -> Tensor:
        """What the tokens come from last, whose dtype they have."""
        raise NotImplementedError

    def _tokens(self, images: Tensor, cls_token: Tensor | None, pos_embed: Tensor) -> Tensor:
        """Tokens with the class token in front and the positions added, as the model would.

        Under autocast a sum with float32 positions is in float32, and stays a sum of its own.
        """
        weight = self._last_weight()
        dtype = autocast_dtype(weight) or weight.dtype
        if pos_embed.dtype == dtype and (cls_token is None or cls_token.dtype == dtype):
            return self._fused(images, pos_embed=pos_embed, cls_token=cls_token)
        x = self._fused(images)
        alone = pos_embed.shape[1] == x.shape[1]
        if alone:
            x = x + pos_embed
        if cls_token is not None:
            x = torch.cat((cls_token.expand(x.shape[0], -1, -1), x), dim=1)
        return x if alone else x + pos_embed


class AcceleratedPatchEmbed(AcceleratedEmbedding):
    """Base of the adapters of patch embeddings: a convolution whose stride is its kernel."""

    _layer = "patch_embed"

    @classmethod
    def _projection(cls, module: Any) -> nn.Conv2d:
        """The convolution."""
        return module.proj

    @classmethod
    def _refusal(cls, module: nn.Module) -> str | None:
        conv = cls._projection(module)
        if conv is not module and not is_plain(conv, nn.Conv2d):
            return f"its projection is a {type(conv).__name__}, or a hook sits on it"
        expected = {"stride": conv.kernel_size, "padding": (0, 0), "dilation": (1, 1), "groups": 1}
        for option, value in expected.items():
            if getattr(conv, option) != value:
                return f"its projection has {option}={getattr(conv, option)}, expected {value}"
        return None

    def _last_weight(self) -> Tensor:
        return self._projection(self).weight

    def _fused(self, images: Tensor, **token_parameters: Any) -> Tensor:
        conv = self._projection(self)
        return patch_embed(
            images, conv.weight, conv.bias, backend=self._backend, **token_parameters
        )

    def _fits(self, images: object) -> bool:
        if not self._serves(images, 4):
            return False
        assert isinstance(images, Tensor)
        # Options of the convolution are plain attributes, and people change them.
        if self._refusal(self) is not None:
            return False
        conv = self._projection(self)
        (height, width), (ph, pw) = images.shape[-2:], conv.kernel_size
        return (
            images.shape[1] == conv.in_channels
            and height % ph == 0
            and width % pw == 0
            and (images.dtype == conv.weight.dtype or autocast_dtype(conv.weight) is not None)
            and images.device == conv.weight.device
        )

    def _is_size(self, images: Any, size: object) -> bool:
        """Whether images have the one size that the layer was built for."""
        return tuple(images.shape[-2:]) == tuple(size)  # type: ignore[arg-type]


class AcceleratedConv2d(AcceleratedPatchEmbed):
    """The convolution itself, in a model that makes tokens of its (B, D, gh, gw)."""

    @classmethod
    def _projection(cls, module: Any) -> nn.Conv2d:
        return module

    def forward(self, input: Tensor) -> Tensor:
        if not self._fits(input):
            return super().forward(input)
        (height, width), (ph, pw) = input.shape[-2:], self._projection(self).kernel_size
        return self._fused(input).transpose(1, 2).unflatten(2, (height // ph, width // pw))


class AcceleratedModel(Accelerated):
    """Base of the adapters of models that complete the tokens of their embedding. Their ``refusal``
    says why class token and positions are not added in its op.
    """

    #: Where the embedding is.
    _embedding: ClassVar[str]
    #: What the report says of it.
    _note: ClassVar[str] = "with class token and positions"

    def _completes(self, images: object) -> bool:
        """Whether the embedding may hand its images on: nobody watches what it gives."""
        embedding = getattr(self, self._embedding)
        return (
            isinstance(embedding, AcceleratedEmbedding)
            and is_plain(embedding, type(embedding))
            and not nn.modules.module._has_any_global_hook()
            and embedding._fits(images)
        )

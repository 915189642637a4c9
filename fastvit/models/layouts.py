# SPDX-License-Identifier: Apache-2.0
"""State-dict layouts of other repositories, and their translation into fastvit's keys.

fastvit's keys are timm's, which are also those of facebookresearch/convit and
facebookresearch/deit. torchvision and the two versions of facebookresearch/pycls (its main
branch, and ``vitconfigs``, which holds the configurations of arXiv 2106.14881) name the same
tensors differently.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor


class Layout(NamedTuple):
    """How a repository names the tensors of a vision transformer.

    Attributes:
        name: what reports and errors call it.
        marker: pattern of a key that occurs in this layout only.
        rules: (pattern of a whole key, fastvit's key); ``{last}`` stands for the index of the
            convolutional stem's final 1x1 convolution.
        sequence_first: the position embedding is (N, 1, D) instead of (1, N, D).
    """

    name: str
    marker: str
    rules: tuple[tuple[str, str], ...]
    sequence_first: bool = False


_PARAMETER = r"(weight|bias)"
_TORCHVISION_BLOCK = r"encoder\.layers\.encoder_layer_(\d+)\."
_PYCLS_BLOCK = r"encoder\.block_(\d+)\."

_TORCHVISION_RULES = (
    (r"class_token", r"cls_token"),
    (r"encoder\.pos_embedding", r"pos_embed"),
    (rf"conv_proj\.{_PARAMETER}", r"patch_embed.proj.\1"),
    (r"conv_proj\.conv_bn_relu_(\d+)\.0\.weight", r"patch_embed.backbone.\1.conv.weight"),
    (r"conv_proj\.conv_bn_relu_(\d+)\.1\.(\w+)", r"patch_embed.backbone.\1.bn.\2"),
    (rf"conv_proj\.conv_last\.{_PARAMETER}", r"patch_embed.backbone.{last}.conv.\1"),
    (rf"{_TORCHVISION_BLOCK}ln_([12])\.{_PARAMETER}", r"blocks.\1.norm\2.\3"),
    (rf"{_TORCHVISION_BLOCK}self_attention\.in_proj_{_PARAMETER}", r"blocks.\1.attn.qkv.\2"),
    (rf"{_TORCHVISION_BLOCK}self_attention\.out_proj\.{_PARAMETER}", r"blocks.\1.attn.proj.\2"),
    # Files saved before torchvision 0.14 say linear_1 and linear_2.
    (rf"{_TORCHVISION_BLOCK}mlp\.(?:0|linear_1)\.{_PARAMETER}", r"blocks.\1.mlp.fc1.\2"),
    (rf"{_TORCHVISION_BLOCK}mlp\.(?:3|linear_2)\.{_PARAMETER}", r"blocks.\1.mlp.fc2.\2"),
    (rf"encoder\.ln\.{_PARAMETER}", r"norm.\1"),
    (rf"heads\.head\.{_PARAMETER}", r"head.\1"),
)

_PYCLS_RULES = (
    (r"class_token", r"cls_token"),
    (r"pos_embedding", r"pos_embed"),
    (rf"stem\.patchify\.{_PARAMETER}", r"patch_embed.proj.\1"),
    (r"stem\.cstem(\d+)_conv\.weight", r"patch_embed.backbone.\1.conv.weight"),
    (r"stem\.cstem(\d+)_bn\.(\w+)", r"patch_embed.backbone.\1.bn.\2"),
    (rf"stem\.cstem_last_conv\.{_PARAMETER}", r"patch_embed.backbone.{last}.conv.\1"),
    (rf"{_PYCLS_BLOCK}ln_([12])\.{_PARAMETER}", r"blocks.\1.norm\2.\3"),
    (rf"{_PYCLS_BLOCK}mlp_block\.linear_([12])\.{_PARAMETER}", r"blocks.\1.mlp.fc\2.\3"),
    (rf"encoder\.ln\.{_PARAMETER}", r"norm.\1"),
    (rf"head\.head_fc\.{_PARAMETER}", r"head.\1"),
)
_PYCLS_MAIN_RULES = (
    (rf"{_PYCLS_BLOCK}self_attention\.block\.in_proj_{_PARAMETER}", r"blocks.\1.attn.qkv.\2"),
    (rf"{_PYCLS_BLOCK}self_attention\.block\.out_proj\.{_PARAMETER}", r"blocks.\1.attn.proj.\2"),
)
_PYCLS_VITCONFIGS_RULES = (
    (rf"{_PYCLS_BLOCK}self_attention\.attn_proj\.{_PARAMETER}", r"blocks.\1.attn.qkv.\2"),
    (rf"{_PYCLS_BLOCK}self_attention\.out_proj\.{_PARAMETER}", r"blocks.\1.attn.proj.\2"),
)

TIMM = Layout("timm", r"blocks\.\d+\..+", ())
LAYOUTS = (
    TIMM,
    Layout("torchvision", _TORCHVISION_BLOCK + ".+", _TORCHVISION_RULES),
    Layout(
        "pycls",
        _PYCLS_BLOCK + r"self_attention\.block\..+",
        _PYCLS_RULES + _PYCLS_MAIN_RULES,
        sequence_first=True,
    ),
    Layout(
        "pycls vitconfigs",
        _PYCLS_BLOCK + r"self_attention\.attn_proj\..+",
        _PYCLS_RULES + _PYCLS_VITCONFIGS_RULES,
    ),
)

# What containers add to the path of a parameter: DataParallel, torch.compile, FSDP, activation
# checkpointing. No module of fastvit's models bears such a name.
_WRAPPERS = frozenset({"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})


class Translation(NamedTuple):
    """A foreign state dict under fastvit's keys.

    Attributes:
        layout: the layout recognised; None if no marker was found, and the keys are kept.
        entries: the values, by fastvit's keys; a key no rule matches is kept.
        origin: the key each entry had in the checkpoint.
    """

    layout: Layout | None
    entries: dict[str, Any]
    origin: dict[str, str]


def _strip_wrappers(key: str) -> str:
    return ".".join(part for part in key.split(".") if part not in _WRAPPERS)


def _translate_key(key: str, rules: tuple[tuple[str, str], ...], last: int) -> str:
    for pattern, ours in rules:
        match = re.fullmatch(pattern, key)
        if match:
            return match.expand(ours).replace("{last}", str(last))
    return key


def translate(state_dict: Mapping[str, Any]) -> Translation:
    """Recognise the layout of a state dict and rename its entries.

    Raises:
        ValueError: if two entries come to bear the same name.
    """
    keys = {key: _strip_wrappers(key) for key in state_dict}
    layout = next(
        (y for y in LAYOUTS if any(re.fullmatch(y.marker, k) for k in keys.values())), None
    )
    rules = layout.rules if layout else ()
    # The final convolution follows the stages, which are numbered from 0.
    stages = [
        int(match[1])
        for key in keys.values()
        if (match := re.match(r"(?:conv_proj\.conv_bn_relu_|stem\.cstem)(\d+)", key))
    ]
    last = max(stages, default=-1) + 1

    entries: dict[str, Any] = {}
    origin: dict[str, str] = {}
    for key, stripped in keys.items():
        ours = _translate_key(stripped, rules, last)
        if ours in entries:
            raise ValueError(f"checkpoint entries {origin[ours]!r} and {key!r} both mean {ours!r}")
        value = state_dict[key]
        if ours == "pos_embed" and layout and layout.sequence_first and isinstance(value, Tensor):
            value = value.transpose(0, 1)
        entries[ours], origin[ours] = value, key
    return Translation(layout, entries, origin)

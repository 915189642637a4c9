# SPDX-License-Identifier: Apache-2.0
"""What ``bench/resources.py`` compiles of the backward of the convolutional stem, one launch each.
Sizes and channels are those of the convolution that is differentiated; one without strides is the
last, 1x1.
"""

from __future__ import annotations

from typing import Any

from kernels.ahead.stem_gradient import Case


def _case(*fields: Any, training: bool = True, pixels: bool = False) -> Case:
    return Case(*fields, training=training, pixels=pixels, direction="backward")


# At most 40 pairs of a kernel and a case.
CASES = (
    # The later layers of ViT_C 1GF, 4GF, 18GF and 36GF, the last 1x1, and images.
    _case("stem_input_gradient", "bfloat16", 256, (112, 112), (24, 48), (2,)),
    _case("stem_input_gradient", "bfloat16", 256, (112, 112), (48, 96), (2,)),
    _case("stem_input_gradient", "bfloat16", 256, (56, 56), (96, 192), (2,)),
    _case("stem_input_gradient", "float16", 256, (28, 28), (192, 384), (2,)),
    _case("stem_input_gradient", "bfloat16", 256, (56, 56), (128, 128), (1,)),
    _case("stem_input_gradient", "float16", 256, (56, 56), (128, 256), (2,), training=False),
    _case("stem_input_gradient", "bfloat16", 256, (14, 14), (384, 384)),
    _case("stem_input_gradient", "bfloat16", 256, (14, 14), (512, 1024), training=False),
    _case("stem_input_gradient", "bfloat16", 1, (224, 224), (3, 48), (2,)),
    _case("stem_input_gradient", "tf32", 256, (56, 56), (96, 192), (2,)),
    _case("stem_input_gradient", "ieee", 256, (56, 56), (128, 256), (2,)),
    _case("stem_weight_gradient", "bfloat16", 256, (112, 112), (24, 48), (2,)),
    _case("stem_weight_gradient", "bfloat16", 256, (112, 112), (48, 96), (2,)),
    _case("stem_weight_gradient", "float16", 256, (56, 56), (96, 192), (2,)),
    _case("stem_weight_gradient", "bfloat16", 256, (56, 56), (128, 128), (1,)),
    _case("stem_weight_gradient", "bfloat16", 256, (14, 14), (384, 384)),
    _case("stem_weight_gradient", "bfloat16", 1, (14, 14), (512, 768)),
    _case("stem_weight_gradient", "tf32", 256, (56, 56), (96, 192), (2,)),
    _case("stem_weight_gradient", "ieee", 256, (56, 56), (128, 256), (2,)),
    # The first layer.
    _case("stem_image_gradient", "bfloat16", 256, (224, 224), (3, 48), (2,)),
    _case("stem_image_gradient", "bfloat16", 256, (224, 224), (3, 48), (2,), pixels=True),
    _case("stem_image_gradient", "float16", 256, (224, 224), (3, 64), (2,), pixels=True),
    _case("stem_image_gradient", "bfloat16", 256, (224, 224), (3, 24), (2,), pixels=True),
    _case("stem_image_gradient", "bfloat16", 1, (224, 224), (4, 72), (1,), pixels=True),
    _case("stem_image_gradient", "bfloat16", 256, (224, 224), (3, 48), (2,), training=False),
    _case("stem_image_gradient", "tf32", 256, (224, 224), (3, 48), (2,), pixels=True),
    _case("stem_image_gradient", "ieee", 256, (224, 224), (3, 48), (2,)),
    # Channels that are no multiple of 8, and images of six.
    _case("stem_input_gradient", "bfloat16", 256, (112, 112), (20, 36), (2,)),
    _case("stem_input_gradient", "bfloat16", 256, (14, 14), (36, 100)),
    _case("stem_input_gradient", "ieee", 256, (56, 56), (37, 101), (2,)),
    _case("stem_weight_gradient", "bfloat16", 256, (112, 112), (20, 36), (2,)),
    _case("stem_weight_gradient", "tf32", 256, (56, 56), (37, 101), (2,)),
    _case("stem_image_gradient", "bfloat16", 256, (224, 224), (6, 20), (2,), pixels=True),
    # What lies between.
    _case("stem_raw_gradient", "bfloat16", 256, (112, 112), (48, 96), (2,)),
    _case("stem_norm_gradient", "bfloat16", 256, (112, 112), (48, 96), (2,)),
    _case("stem_weight_sum", "bfloat16", 256, (112, 112), (48, 96), (2,)),
    _case("stem_weight_sum", "bfloat16", 256, (224, 224), (3, 48), (2,), pixels=True),
)

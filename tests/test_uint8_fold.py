# SPDX-License-Identifier: Apache-2.0
"""The uint8 fold by the compiled module and by PyTorch, against its formula."""

from __future__ import annotations

import pytest
import torch

from fastvit import _native
from fastvit.ops.uint8_fold import fold_uint8

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@pytest.fixture(params=["native", "torch"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "torch":
        monkeypatch.setattr(_native, "reason", lambda: "hidden by this test")
    else:
        assert _native.reason() is None
    return request.param


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("normalized", [True, False], ids=["mean_std", "div_255"])
@pytest.mark.parametrize("with_bias", [True, False], ids=["bias", "no_bias"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_fold(dtype: torch.dtype, with_bias: bool, normalized: bool) -> None:
    # 5 x 7 patches: a row of the weight is no multiple of any vector width.
    weight = torch.randn(6, 3, 5, 7).to(dtype)
    bias = torch.randn(6).to(dtype) if with_bias else None
    mean, std = (MEAN, STD) if normalized else (None, None)
    folded, folded_bias, offset = fold_uint8(weight, bias, mean, std)

    channels = {"dtype": torch.float64}
    center = 255 * torch.tensor(MEAN if normalized else (0.0,) * 3, **channels).view(3, 1, 1)
    scale = 255 * torch.tensor(STD if normalized else (1.0,) * 3, **channels).view(3, 1, 1)
    expected = weight.double() / scale
    expected_bias = (expected * (center.round() - center)).sum((1, 2, 3))
    if bias is not None:
        expected_bias += bias.double()
    tolerance = 1e-12 if dtype == torch.float64 else 1e-6
    torch.testing.assert_close(folded.double(), expected, rtol=tolerance, atol=0)
    torch.testing.assert_close(folded_bias.double(), expected_bias, rtol=tolerance, atol=tolerance)
    assert torch.equal(offset.double(), center.round())
    assert folded.dtype == folded_bias.dtype == torch.promote_types(dtype, torch.float32)

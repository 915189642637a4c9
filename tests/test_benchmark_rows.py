# SPDX-License-Identifier: Apache-2.0
"""The rows of the papers' tables, their models, and the counter that must reproduce them."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fastvit.benchmark.counter import count
from fastvit.benchmark.library import build_fastvit, build_library
from fastvit.benchmark.rows import SMOKE_ROWS, load_rows, select_rows

ROWS = load_rows()
OURS = [row for row in ROWS if row.fastvit is not None]


def names(rows):
    return [row.name for row in rows]


by_name = pytest.mark.parametrize("row", ROWS, ids=names(ROWS))


def test_the_tables_are_complete():
    assert len(ROWS) == len({row.name for row in ROWS}) == 31
    assert len(OURS) == 16
    assert {row.name: row.matched for row in ROWS if row.matched} == {
        "RegNetZ-1GF": "matched",
        "RegNetZ-4GF": "head matched",
        "RegNetZ-16GF": "matched",
        "RegNetZ-32GF": "matched",
    }


@by_name
def test_a_row_cites_what_its_table_prints(row):
    """The ConViT paper prints images/s and accuracy, the other minutes and three errors."""
    paper = row.paper
    minutes = (paper.time_min, paper.acts_m, paper.error_100, paper.error_200, paper.error_400)
    if row.family in ("DeiT", "ConViT"):
        assert paper.images_per_s
        assert paper.top1
        assert not any(minutes)
    else:
        assert all(minutes)
        assert paper.images_per_s is paper.top1 is None
        assert paper.error_100 >= paper.error_200 >= paper.error_400
    assert row.batch_per_gpu * 8 == paper.batch


@by_name
def test_printed_figures_are_met_as_far_as_the_paper_rounds(row):
    """Early Convolutions prints to 0.1 G flops, 0.06 M parameters, 0.2 M activations.

    The ConViT table leaves out the classifier and mostly the attention products, and rounds to
    whole millions.
    """
    counted, paper = row.verified, row.paper
    if row.family in ("DeiT", "ConViT"):
        head = (row.embed_dim + 1) * 1000
        assert abs((counted.params - head) / 1e6 - paper.params_m) < 1.0
        assert paper.flops_b <= counted.flops / 1e9 < 1.08 * paper.flops_b
    else:
        assert abs(counted.flops / 1e9 - paper.flops_b) <= 0.1
        assert abs(counted.params / 1e6 - paper.params_m) <= 0.06
        assert abs(counted.acts / 1e6 - paper.acts_m) <= 0.2


@by_name
def test_the_library_model_counts_as_published(row):
    with torch.device("meta"):
        model = build_library(row)
    assert count(model, row.image_size) == row.verified


@pytest.mark.parametrize("row", OURS, ids=names(OURS))
def test_the_fastvit_model_counts_as_published(row):
    with torch.device("meta"):
        model = build_fastvit(row)
    assert count(model, row.image_size) == row.verified


@by_name
def test_the_library_model_starts_with_the_stem_of_the_row(row):
    with torch.device("meta"):
        model = build_library(row)
    convolutions = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    expected = [layer for layer in row.stem if layer.op == "conv"]
    for conv, layer in zip(convolutions, expected, strict=False):
        built = (conv.in_channels, conv.out_channels, conv.kernel_size[0], conv.stride[0])
        assert built == (layer.in_ch, layer.out_ch, layer.kernel, layer.stride)
        assert conv.padding[0] == layer.padding
        assert (conv.bias is not None) == layer.bias


def test_counting_leaves_the_model_alone():
    (row,) = select_rows(["ConViT-S"])
    model = build_fastvit(row)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    assert count(model, row.image_size) == row.verified
    assert model.training
    assert all(not p.is_meta and p.grad is None for p in model.parameters())
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


@pytest.mark.parametrize(
    "product",
    [
        lambda x: torch.einsum("bchw,bcij->bhwij", x, x),
        lambda x: torch.baddbmm(x[:, 0], x[:, 0], x[:, 0]),
        lambda x: torch.ops.aten.mm(x[0, 0], x[0, 0]),
    ],
    ids=["einsum", "baddbmm", "operator"],
)
def test_a_product_without_a_rule_is_refused(product):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(1))

        def forward(self, x):
            return product(x) * self.weight

    with pytest.raises(NotImplementedError, match="the counter has no rule for"):
        count(Model(), 4)


class TestSelection:
    def test_keeps_the_order_of_the_tables_whatever_the_case(self):
        chosen = select_rows(["vit_c-*", " ResNet-50 ", "convit-s+", "ViT_C-4GF"])
        assert names(chosen) == [
            "ConViT-S+",
            "ResNet-50",
            "ViT_C-1GF",
            "ViT_C-4GF",
            "ViT_C-18GF",
            "ViT_C-36GF",
        ]

    def test_the_smoke_test_is_six_transformers_of_every_family_and_a_cnn(self):
        chosen = select_rows(SMOKE_ROWS)
        assert len(chosen) == 7
        assert sum(row.fastvit is None for row in chosen) == 1
        families = {row.family for row in chosen if row.fastvit}
        assert families == {"DeiT", "ConViT", "ViT_P", "ViT_C"}

    @pytest.mark.parametrize(
        ("patterns", "message"),
        [
            (["ViT_C-4GB"], r"'ViT_C-4GB'; the nearest names are ViT_C-4GF"),
            (["DeiT-S", "zzz"], r"'zzz'; the rows are DeiT-S, ConViT-S"),
            (["", " "], "expected at least one name of a row, got none"),
        ],
        ids=["misspelt", "unlike-any", "empty"],
    )
    def test_names_what_it_cannot_find(self, patterns, message):
        with pytest.raises(ValueError, match=message):
            select_rows(patterns)

"""Margins: every comparison in one bin, the median exact, the edge of the bound on the right side."""

from __future__ import annotations

import json
from dataclasses import asdict

import pytest

from conformance.margin import BINS, Margin, margins


def test_every_comparison_is_in_one_bin() -> None:
    ratios = [0.0, 0.049, 0.05, 0.5, 0.999, 1.0, 1.0000001, 7.0, float("inf")]
    margin = Margin.of("float32", ratios)
    assert len(margin.bins) == BINS + 1
    assert sum(margin.bins) == margin.count == len(ratios)
    assert (margin.bins[0], margin.bins[1], margin.bins[10]) == (2, 1, 1)
    assert margin.bins[-2:] == (2, 3), "1 meets the bound, what is above it does not"


@pytest.mark.parametrize(
    ("ratios", "median"),
    [
        ([0.2], 0.2),
        ([0.5, 0.25], 0.375),
        ([0.75, 0.0, 0.5], 0.5),
        ([float("inf")] * 2, float("inf")),
        ([0.5, float("inf")], float("inf")),
    ],
)
def test_the_median_is_exact(ratios: list[float], median: float) -> None:
    assert Margin.of("float16", ratios).median == median


def test_dtypes_stand_in_one_order() -> None:
    first = margins({"float32": [0.1], "bfloat16": [0.2]})
    assert first == margins({"bfloat16": [0.2], "float32": [0.1]})
    assert [m.dtype for m in first] == ["bfloat16", "float32"]


def test_a_margin_survives_json() -> None:
    margin = Margin.of("bfloat16", [0.1, 0.7])
    assert Margin(**json.loads(json.dumps(asdict(margin)))) == margin

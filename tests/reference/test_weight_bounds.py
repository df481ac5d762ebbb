"""Doubly quantised weights: fused or not, the dequantised weight is within its bound."""

from __future__ import annotations

import numpy as np
import pytest

from reference import (
    NestedAbsmax,
    bound_nested_weight,
    codebook,
    dequantize_4bit,
    dequantize_absmax,
    dynamic_map,
    quantize_4bit,
    quantize_absmax,
)
from reference.codebooks import QuantType
from tests.reference.judging import ratio


def quantised(seed: int, quant_type: QuantType) -> tuple[np.ndarray, NestedAbsmax, tuple[int, int]]:
    """Packed codes and nested scales of a weight whose blocks differ in size."""
    rng = np.random.default_rng(seed)
    shape = (int(rng.integers(1, 40)), int(rng.integers(1, 200)))
    weight = rng.standard_normal(shape) * rng.lognormal(0, 1, (shape[0], 1))
    packed, absmax = quantize_4bit(weight, quant_type)
    return packed, quantize_absmax(absmax), shape


def fused(
    packed: np.ndarray, nested: NestedAbsmax, shape: tuple[int, int], kind: QuantType
) -> np.ndarray:
    """code₂ · absmax₂ + offset with one rounding, as a fused multiply-add makes it."""
    outer = np.repeat(nested.absmax, 256)[: nested.codes.size].astype(np.float64)
    exact = dynamic_map()[nested.codes].astype(np.float64) * outer + float(nested.offset)
    return dequantize_4bit(packed, exact.astype(np.float32), shape, kind)


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_both_ways_stay_within_the_bound(kind: QuantType) -> None:
    seen = []
    for seed in range(60):
        packed, nested, shape = quantised(seed, kind)
        W = bound_nested_weight(packed, nested, shape, kind)
        plain = dequantize_4bit(packed, dequantize_absmax(nested), shape, kind)
        seen += [ratio(plain, W), ratio(fused(packed, nested, shape, kind), W)]
    assert 0.3 < max(seen) <= 1.0


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_a_missing_offset_and_a_neighbouring_code_leave_it(kind: QuantType) -> None:
    for seed in range(20):
        packed, nested, shape = quantised(seed, kind)
        W = bound_nested_weight(packed, nested, shape, kind)
        without = nested._replace(offset=np.float32(0))
        next_code = nested._replace(
            codes=np.where(nested.codes > 0, nested.codes - 1, 1).astype(np.uint8)
        )
        for wrong in (without, next_code):
            off = dequantize_4bit(packed, dequantize_absmax(wrong), shape, kind)
            # A single block that is its own mean has a centred absmax of zero, which hides its code.
            if (nested.absmax > 0).all() or wrong is without:
                assert ratio(off, W) > 1


def test_zero_codes_are_exact() -> None:
    zeros = np.full(8, 0x77, dtype=np.uint8)  # nf4's zero, twice in a byte
    assert codebook("nf4")[7] == 0
    W = bound_nested_weight(zeros, quantize_absmax(np.ones(1, np.float32)), (4, 4), "nf4")
    assert not W.value.any()
    assert not W.bound.any()

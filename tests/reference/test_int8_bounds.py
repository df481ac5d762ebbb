"""The bounds of LLM.int8() hold for pipelines that round where they may, and catch those that err."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from reference import (
    CPU_CONSTANT,
    CUDA_CONSTANT,
    FORMATS,
    TRUE_CONSTANT,
    Arithmetic,
    ambiguous_codes,
    bound_int8_dx,
    bound_int8_output,
    bound_int8_train,
    bound_rows,
    dequantize_rows,
    linear_int8,
    outlier_columns,
    quantize_rows,
    round_to,
)
from tests.reference.judging import ratio

F64 = np.ndarray
SEEDS = range(60)


class Layer:
    """x (rows, in) in the format and exact in float16, codes, scales, a bias or none, dout."""

    def __init__(self, seed: int, io: str, outliers: int = 0) -> None:
        rng = np.random.default_rng(seed)
        rows, n, out = int(rng.integers(1, 6)), int(rng.integers(4, 200)), int(rng.integers(1, 20))
        x = rng.standard_normal((rows, n)) * 0.9
        x = np.clip(x, -5.0, 5.0)
        for column in range(outliers):
            x[:, column] = rng.choice([-9.5, 8.25, 30.0], rows)
        self.x = round_to(round_to(x, io), "float16")
        # Codes in doubt are no matter of the bound, so such elements are drawn again.
        threshold = 6.0 if outliers else 0.0
        while (doubtful := ambiguous_codes(self.x, threshold)).any():
            self.x = np.where(doubtful, round_to(rng.standard_normal(x.shape), "bfloat16"), self.x)
        self.codes, self.scales = quantize_rows(rng.standard_normal((out, n)) * 0.05)
        self.bias = round_to(rng.standard_normal(out), io) if seed % 2 else None
        self.dout = round_to(rng.standard_normal((rows, out)), io)
        self.io, self.threshold = io, threshold
        self.arithmetic = Arithmetic.permissive(io)

    def bounded(self) -> tuple[F64, F64]:
        return bound_int8_output(
            self.x, self.codes, self.scales, self.bias, self.arithmetic, self.threshold
        )


def stored_early(layer: Layer) -> F64:
    """The product stored in io, then outliers and bias added there, 1 / 127 applied twice."""
    io, single = layer.io, np.float32
    outliers = outlier_columns(layer.x, layer.threshold)
    codes, scales = quantize_rows(layer.x, layer.threshold)
    product = (codes.astype(np.int64) @ layer.codes.T.astype(np.int64)).astype(single)
    product = product * (scales / single(127))[:, None] * (layer.scales / single(127))
    y = round_to(product, io)
    W = round_to(dequantize_rows(layer.codes, layer.scales), io)[:, outliers]
    outer = round_to((layer.x[:, outliers].astype(single) @ W.T.astype(single)), io)
    if layer.bias is not None:
        y = round_to(y + layer.bias, io)
    return round_to(y + outer, io)


def kept_late(layer: Layer) -> F64:
    """Everything in float32, scaled by the library's constant for CUDA, and rounded once."""
    y = linear_int8(
        layer.x, layer.codes, layer.scales, layer.bias,
        dtype="float32", threshold=layer.threshold, constant=CUDA_CONSTANT,
    )  # fmt: skip
    return round_to(y, layer.io)


def librarys(layer: Layer) -> F64:
    """bitsandbytes' order of operations, with the constant that it means."""
    return linear_int8(
        layer.x, layer.codes, layer.scales, layer.bias,
        dtype=layer.io, threshold=layer.threshold, constant=TRUE_CONSTANT,
    )  # fmt: skip


@pytest.mark.parametrize("pipeline", [stored_early, kept_late, librarys])
@pytest.mark.parametrize("outliers", [0, 2])
@pytest.mark.parametrize("io", FORMATS)
def test_quantised_products_stay_within_the_bound(
    io: str, outliers: int, pipeline: Callable[[Layer], F64]
) -> None:
    seen = [ratio(pipeline(layer), layer.bounded()) for layer in made(io, outliers)]
    assert 0.02 < max(seen) <= 1.0


@pytest.mark.parametrize("io", FORMATS)
def test_dequantised_products_stay_within_the_bound(io: str) -> None:
    """x Wᵀ + b and G W with W in io, as in train mode on the CPU and in every backward."""
    seen = []
    for layer in made(io, 0):
        W = dequantize_rows(layer.codes, layer.scales, io).astype(np.float32)
        product = layer.x.astype(np.float32) @ W.T
        y = round_to(product if layer.bias is None else round_to(product, io) + layer.bias, io)
        dx = round_to(layer.dout.astype(np.float32) @ W, io)
        bias, a = layer.bias, layer.arithmetic
        seen += [
            ratio(y, bound_int8_train(layer.x, layer.codes, layer.scales, bias, a)),
            ratio(dx, bound_int8_dx(layer.dout, layer.codes, layer.scales, a)),
        ]
    assert 0.02 < max(seen) <= 1.0


def made(io: str, outliers: int) -> list[Layer]:
    return [Layer(seed, io, outliers) for seed in SEEDS]


def test_rows_are_bounded_in_either_order() -> None:
    seen = []
    for layer in made("float32", 0):
        W = bound_rows(layer.codes, layer.scales)
        codes, scales = layer.codes.astype(np.float32), layer.scales[:, None]
        for dequantised in (codes * scales / np.float32(127), codes * (scales / np.float32(127))):
            seen.append(ratio(dequantised.astype(np.float64), W))
        seen.append(ratio(dequantize_rows(layer.codes, layer.scales), W))
        assert ratio(W.value * 127.0 / 128.0, W) > 1
    assert 0.1 < max(seen) <= 1.0


@pytest.mark.parametrize("io", FORMATS)
def test_faults_leave_the_bound(io: str) -> None:
    """1/128, truncated codes, activations that are not quantised: in every format."""
    for layer in made(io, 0)[:10]:
        true = layer.bounded()
        if layer.x.shape[1] < 16:
            continue
        codes, scales = quantize_rows(layer.x)
        scaled = 127.0 * layer.x / scales.astype(np.float64)[:, None]
        columns = scales.astype(np.float64)[:, None] * layer.scales / 127.0**2
        b = 0.0 if layer.bias is None else layer.bias
        assert ratio((codes * 1.0) @ layer.codes.T * columns * (127.0 / 128.0) + b, true) > 1
        assert ratio(np.trunc(scaled) @ layer.codes.T * columns + b, true) > 1


def test_the_cpus_missing_digit_is_seen_in_float32() -> None:
    """6.200124e-05 is 1.8e-5 too much, three hundred roundings: docs/defects has it."""
    for layer in made("float32", 0)[:10]:
        y = linear_int8(
            layer.x, layer.codes, layer.scales, layer.bias, dtype="float32", constant=CPU_CONSTANT
        )
        assert ratio(y, layer.bounded()) > 1


def test_ambiguous_codes_are_those_in_the_middle() -> None:
    assert ambiguous_codes(np.array([[127.0, 0.5, 3.5, 4.0]])).tolist() == [
        [False, True, True, False]
    ]
    assert not ambiguous_codes(np.array([[127.0, 0.25, 3.0, -4.0]])).any()
    assert not ambiguous_codes(np.zeros((2, 3))).any()

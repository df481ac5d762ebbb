"""LLM.int8(): row-wise quantisation and the linear layer over it (arXiv 2208.07339).

What bitsandbytes 0.50.2 computes on the CPU, where it evaluates two different functions: in eval
the activations are quantised too (`linear_int8`), in train they are not (`linear_int8_train`).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from reference.formats import round_to

__all__ = [
    "CPU_CONSTANT",
    "CUDA_CONSTANT",
    "TRUE_CONSTANT",
    "QuantizedRows",
    "backward_int8",
    "dequantize_rows",
    "linear_int8",
    "linear_int8_train",
    "outlier_columns",
    "quantize_rows",
]

F32 = NDArray[np.float32]
F64 = NDArray[np.float64]
I8 = NDArray[np.int8]

# An int8 product of rows scaled by 127 is scaled back by 1 / 127². bitsandbytes writes the number
# down, on the CPU with a digit missing: its results are 1 + 1.8e-5 times the true ones there.
TRUE_CONSTANT = 1.0 / 127.0**2
CPU_CONSTANT = 6.200124e-05
CUDA_CONSTANT = 6.200012e-05
OUTLIER_CONSTANT = 7.874015718698502e-3  # 1 / 127, in the dequantisation of outlier columns.


class QuantizedRows(NamedTuple):
    """codes (rows, in), CA or CB in bitsandbytes, and scales (rows,), SCA or SCB."""

    codes: I8
    scales: F32


def outlier_columns(x: NDArray[np.floating], threshold: float) -> NDArray[np.intp]:
    """Indices (k,) of the columns of x (rows, in) with a |float16(x)| >= threshold > 0."""
    return np.flatnonzero(_outlying(_to_half(x), threshold).any(axis=0))


def _to_half(x: NDArray[np.floating]) -> F32:
    """float16(x), to which bitsandbytes casts weights and activations alike, as float32."""
    return round_to(np.asarray(x), "float16").astype(np.float32)


def _outlying(half: F32, threshold: float) -> NDArray[np.bool_]:
    return np.asarray(np.abs(half) >= np.float32(threshold if threshold > 0 else np.nan))


def quantize_rows(x: NDArray[np.floating], threshold: float = 0.0) -> QuantizedRows:
    """Codes round(x · fl(127 · fl(1 / absmax))), half to even, and absmax of each float16 row.

    x: (rows, in), cast to float16 first. threshold: 0 for none; otherwise the codes of outlier
    columns are zero. Such an element does not count for its row's absmax, but a smaller one in
    an outlier column does. A row of zeros has scale and codes zero; a row that overflows float16
    has an infinite scale, and codes that mean nothing.
    """
    half = _to_half(x)
    outlying = _outlying(half, threshold)
    kept = np.where(outlying, np.float32(0), half)
    scales = np.abs(kept).max(axis=1, initial=0.0).astype(np.float32)
    with np.errstate(divide="ignore", invalid="ignore"):
        # PyTorch evaluates 127 / s as fl(127 · fl(1 / s)), which decides about one code in 10,000.
        inverse = np.float32(1) / scales
        codes = np.rint(kept * (np.float32(127) * inverse)[:, None])
    codes[:, outlying.any(axis=0)] = 0
    return QuantizedRows(np.nan_to_num(codes, nan=0.0).astype(np.int8), scales)


def dequantize_rows(codes: I8, scales: F32, dtype: str = "float32") -> F64:
    """W = CB · fl(SCB · fl(1 / 127)) rounded to the format `dtype`, (out, in), as float64 values.

    This is the weight of the layer in train mode on the CPU, and of every backward.
    """
    columns = np.asarray(scales, dtype=np.float32) * np.float32(1.0 / 127.0)
    return round_to(codes.astype(np.float32) * columns[:, None], dtype)


def linear_int8(
    x: NDArray[np.floating],
    codes: I8,
    scales: F32,
    bias: NDArray[np.floating] | None = None,
    *,
    dtype: str,
    threshold: float = 0.0,
    constant: float = CPU_CONSTANT,
) -> F64:
    """The layer in eval mode: y (rows, out) in the format `dtype`, as float64 values.

    x: (rows, in), in `dtype`. codes, scales: CB (out, in) and SCB (out,) of `quantize_rows`.
    bias: (out,), taken into `dtype` first. threshold, see `quantize_rows`. constant: what scales an
    int8 product back; give TRUE_CONSTANT for what the paper means.

    The product of codes is exact, and float32 from there, in this order:
    fl(fl(fl(acc) · fl(s_row s_col)) · constant), plus bias, and a rounding to `dtype`. Without
    outliers that is the result, bit for bit. Outlier columns are then added: unquantised x times
    fl(fl(CB · SCB) / 127) in `dtype`, which BLAS sums in an order of its own. Here the sum is exact
    and rounded once, so bitsandbytes may differ by (k + 1) u_32 (|x||W| + |y|) + u |y|, with k
    outlier columns and the roundoff u of `dtype`.
    """
    exact = np.asarray(x, dtype=np.float64)
    quantized, outliers = quantize_rows(exact, threshold), outlier_columns(exact, threshold)
    accumulated = quantized.codes.astype(np.float64) @ codes.astype(np.float64).T  # rows, out
    with np.errstate(invalid="ignore"):
        scale = quantized.scales[:, None] * np.asarray(scales, dtype=np.float32)
        y = accumulated.astype(np.float32) * scale * np.float32(constant)
    if bias is not None:
        y = y + round_to(np.asarray(bias), dtype).astype(np.float32)
    rounded = round_to(y, dtype)
    if not outliers.size:
        return rounded
    columns = codes[:, outliers].astype(np.float32)
    weight = columns * np.asarray(scales, dtype=np.float32)[:, None] * np.float32(OUTLIER_CONSTANT)
    return round_to(rounded + exact[:, outliers] @ round_to(weight, dtype).T, dtype)


def linear_int8_train(
    x: NDArray[np.floating],
    codes: I8,
    scales: F32,
    bias: NDArray[np.floating] | None = None,
    *,
    dtype: str,
) -> F64:
    """The layer in train mode on the CPU: x (rows, in) times the dequantised weight; (rows, out).

    Activations are not quantised and the threshold plays no part. In float64, not rounded to
    `dtype`: an implementation's sum differs as `bound_base_output` says of this weight.
    """
    y: F64 = np.asarray(x, dtype=np.float64) @ dequantize_rows(codes, scales, dtype).T
    return y if bias is None else y + round_to(np.asarray(bias), dtype)


def backward_int8(dout: NDArray[np.floating], codes: I8, scales: F32, *, dtype: str) -> F64:
    """dx = G W, (rows, in), in either mode: quantising x counts as the identity (straight through).

    dout: G (rows, out). In float64, not rounded to `dtype`; see `bound_base_dx`.
    """
    dx: F64 = np.asarray(dout, dtype=np.float64) @ dequantize_rows(codes, scales, dtype)
    return dx

"""Error bounds of the LLM.int8() layer: the product of codes, the outlier columns, the gradient.

Where the true codes are not in doubt, that is: an element whose scaled value lies within a few
roundings of a half may take either neighbour, which no bound here allows for (`ambiguous_codes`).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from reference.arithmetic import Arithmetic, Bounded
from reference.base_bounds import bound_base_dx, bound_base_output
from reference.formats import FORMATS, round_to
from reference.int8 import outlier_columns, quantize_rows
from reference.weight_bounds import bound_rows

__all__ = ["ambiguous_codes", "bound_int8_dx", "bound_int8_output", "bound_int8_train"]

F64 = NDArray[np.float64]
I8 = NDArray[np.int8]
F32 = NDArray[np.float32]

# acc to float32, s_row s_col, their product, 1 / 127² (or 1 / 127 twice), and the last product.
PRODUCT_ROUNDINGS = 6
# fl(1 / s), fl(127 · that), and its product with x, with one to spare.
CODE_ROUNDINGS = 4


def ambiguous_codes(x: F64, threshold: float = 0.0) -> NDArray[np.bool_]:
    """Where x (rows, in) is so near to the middle of two codes that rounding decides; (rows, in)."""
    scales = quantize_rows(x, threshold).scales.astype(np.float64)
    half = round_to(x, "float16")
    with np.errstate(divide="ignore", invalid="ignore"):
        scaled = np.where(scales[:, None] > 0, 127.0 * half / scales[:, None], 0.0)
    distance = np.abs(np.abs(scaled - np.trunc(scaled)) - 0.5)
    return np.asarray(distance <= CODE_ROUNDINGS * FORMATS["float32"].roundoff * 127.0)


def bound_int8_output(
    x: F64,
    codes: I8,
    scales: F32,
    bias: F64 | None,
    arithmetic: Arithmetic,
    threshold: float = 0.0,
) -> Bounded:
    """The layer with quantised activations, (rows, out), and its bound.

    x: (rows, in), exact in io and in float16. codes, scales: CB (out, in), SCB (out,). bias: (out,)
    exact in io. threshold: 0 for none, see `quantize_rows`.

    With p = acc s_row s_col / 127² (acc, a sum of products of codes, is exact), o = X_o W_oᵀ over the
    outlier columns in io, and b, of which the k that are not zero are added in any order:

        |ŷ - y| <= ((1 + u_32)^6 - 1) |p| + u |p| + bound(o) + (k - 2) u (|p| + |o| + |b|) + u |y|

    where u |p| is for a product stored in io, and the last two for the k - 1 additions.
    """
    io, single = arithmetic.io, FORMATS["float32"]
    quantized, outliers = quantize_rows(x, threshold), outlier_columns(x, threshold)
    accumulated = quantized.codes.astype(np.float64) @ codes.astype(np.float64).T  # rows, out
    row, column = quantized.scales.astype(np.float64)[:, None], scales.astype(np.float64)
    product = accumulated * (row * column) / 127.0**2  # rows, out
    relative = (1.0 + single.roundoff) ** PRODUCT_ROUNDINGS - 1.0
    error = relative * np.abs(product)
    error = error + io.roundoff * (np.abs(product) + error)
    error = error + np.where(product != 0, PRODUCT_ROUNDINGS * single.underflow + io.underflow, 0.0)

    outer = Bounded(np.zeros_like(product), np.zeros_like(product))
    if outliers.size:
        outer = bound_int8_train(x[:, outliers], codes[:, outliers], scales, None, arithmetic)
    b = np.zeros(codes.shape[0]) if bias is None else np.asarray(bias, dtype=np.float64)
    b = np.broadcast_to(b, product.shape)
    value = product + outer.value + b
    error = error + outer.bound
    addends = sum(np.sign(np.abs(part)) for part in (product, outer.value, b))
    magnitude = np.abs(product) + np.abs(outer.value) + np.abs(b) + error
    early = np.maximum(addends - 2.0, 0.0) * io.roundoff * magnitude
    last = (addends > 1) * (io.roundoff * (np.abs(value) + error + early) + 2.0 * io.underflow)
    return Bounded(value, error + early + last)


def bound_int8_train(
    x: F64, codes: I8, scales: F32, bias: F64 | None, arithmetic: Arithmetic
) -> Bounded:
    """x Wᵀ + b on the dequantised weight, (..., out): the layer where activations stay as they are."""
    W = bound_rows(codes, scales)
    y = bound_base_output(x, W.value, bias, arithmetic)
    return Bounded(y.value, y.bound + _carried(np.abs(x), W.bound.T, arithmetic))


def bound_int8_dx(dout: F64, codes: I8, scales: F32, arithmetic: Arithmetic) -> Bounded:
    """dx = G W, (..., in): straight through the quantisation of x."""
    W = bound_rows(codes, scales)
    dx = bound_base_dx(dout, W.value, arithmetic)
    return Bounded(dx.value, dx.bound + _carried(np.abs(dout), W.bound, arithmetic))


def _carried(left: F64, error: F64, arithmetic: Arithmetic) -> F64:
    """What an error of the weight makes of a product, with the product's own roundings on top."""
    return np.asarray((left @ error) * (1.0 + 8.0 * arithmetic.io.roundoff))

"""Error bounds for the frozen base layer on its dequantised weight (the "dequantised" lane)."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from reference.arithmetic import Arithmetic, Bounded
from reference.formats import FORMATS

__all__ = ["bound_base_dx", "bound_base_output"]

F64 = NDArray[np.float64]

# bitsandbytes' CUDA kernels for few rows take code and absmax to the io format, multiply there, and
# multiply by x there; a nested absmax that was first stored in io makes a fifth rounding.
HALF_ROUNDINGS = 5
# In float32 the two products absmax2 * code2 and absmax * code may be fused with what follows.
SINGLE_ROUNDINGS = 2


def bound_base_output(x: F64, W: F64, bias: F64 | None, arithmetic: Arithmetic) -> Bounded:
    """y = x Wᵀ + b, (..., out), and its bound.

    x: (..., in), exact in io. W: (out, in), the dequantised weight, whose quantisation error is no
    error here. bias: (out,) or None, which may be cast to io.

    With t roundings of each term x_i W_oi, ν non-zero terms in any order, the bias as the start of
    the sum or added to the stored product, and T = |x||W|ᵀ + |b|,

        |ŷ - y| <= (t u + ν u_a) |x||W|ᵀ + (u + ν u_a) |b| + u |x Wᵀ| [if b] + u |y| + higher + η

    where higher = (e^κ - 1 - κ) T, κ being the sum of all the roundings on one path.
    """
    x, W = np.asarray(x, dtype=np.float64), np.asarray(W, dtype=np.float64)
    rows = x.reshape(-1, W.shape[1])
    b = np.zeros(W.shape[0]) if bias is None else np.asarray(bias, dtype=np.float64)
    value, bound = _bound_product(rows, W.T, b, arithmetic)
    shape = (*x.shape[:-1], W.shape[0])
    return Bounded(value.reshape(shape), bound.reshape(shape))


def bound_base_dx(dout: F64, W: F64, arithmetic: Arithmetic) -> Bounded:
    """dx = G W, (..., in), for dout G (..., out) and W (out, in); straight through for int8."""
    dout, W = np.asarray(dout, dtype=np.float64), np.asarray(W, dtype=np.float64)
    value, bound = _bound_product(dout.reshape(-1, W.shape[0]), W, np.zeros(W.shape[1]), arithmetic)
    shape = (*dout.shape[:-1], W.shape[1])
    return Bounded(value.reshape(shape), bound.reshape(shape))


def _bound_product(left: F64, right: F64, bias: F64, arithmetic: Arithmetic) -> Bounded:
    """left (m, a) @ right (a, o) + bias (o,), as bounded in `bound_base_output`."""
    io, ua = arithmetic.io, arithmetic.accumulator
    half = io.precision < FORMATS["float32"].precision
    roundings = HALF_ROUNDINGS if half else SINGLE_ROUNDINGS
    single = FORMATS["float32"].underflow

    product = left @ right
    value = product + bias
    magnitude = np.abs(left) @ np.abs(right)
    terms = np.sign(np.abs(left)) @ np.sign(np.abs(right))
    added = (np.abs(bias) > 0) & (terms > 0)
    kappa = (roundings + 3) * io.roundoff + (terms.max(initial=0.0) + 1) * ua
    # A weight below io's normal range loses η as it is stored, before it meets x; so may a term.
    lost = roundings * io.underflow * (np.abs(left) @ np.sign(np.abs(right)) + terms)
    error = (
        (roundings * io.roundoff + terms * ua) * magnitude
        + (io.roundoff * (np.abs(bias) > 0) + terms * ua) * np.abs(bias)
        + added * io.roundoff * np.abs(product)
        + (np.expm1(kappa) - kappa) * (magnitude + np.abs(bias))
        + np.where(terms > 0, lost + 2 * single * terms + io.underflow, 0.0)
    )
    error = error + io.roundoff * (np.abs(value) + error) + io.underflow * (value != 0)
    return Bounded(value, error)

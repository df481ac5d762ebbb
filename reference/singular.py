"""The bound of dE, the one gradient that is a closed loop of four matrices and no chain.

For one rank with column b of B and row a of A, dE = c bᵀGᵀX̃ a, all of whose indices are summed:
rows m, outputs o, inputs i. With p = G b, h = X̃ a, K = GᵀX̃, q = X̃ᵀp and w = Gᵀh (the rank's rows
of dZ·B, of the hidden vector, of the dense weight's gradient, of dA' and of dB'), an evaluation
forms two of these on its way, in one of five orders:

    p, q: (bᵀGᵀ X̃) a        p, h: (G b)·(X̃ a)        h, w: bᵀ(Gᵀ (X̃ a))
    K, q: (bᵀ K) a           K, w: bᵀ (K a)

As in `reference.chain`, the first-order effect of a rounding is the level of its place, |what is
rounded| times |what the exact rest multiplies it by|, summed:

    p or h, once summed     π = |p|·|h|            while p is summed  α_p = (|G||b|)·|h|
    q                       λ_q = |q|·|a|          while h is summed  α_h = |p|·(|X̃||a|)
    w                       λ_w = |b|·|w|          while K is summed  τ = |b|ᵀ|G|ᵀ|X̃||a|
    K                       λ_K = |b|ᵀ|K||a|

An entry of G has level α_p, of X̃ α_h, of a λ_q, of b λ_w. Each order sums once over outputs (N),
once over rows (M) and once over inputs (n); its cost is u_a times the number of terms times the
level while that sum runs. c may be applied anywhere: the largest of the levels but τ. Higher orders
are at most (e^κ - 1 - κ) τ. E itself takes no part: dE does not depend on it.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from reference.arithmetic import Arithmetic, Bounded
from reference.chain import STORES, Scale
from reference.formats import FORMATS

__all__ = ["bound_singular"]

F64 = NDArray[np.float64]


def bound_singular(
    dropped: F64,
    A: F64,
    B: F64,
    dout: F64,
    scale: Scale,
    dropout_roundings: int,
    arithmetic: Arithmetic,
) -> Bounded:
    """dE = c diag(BᵀGᵀX̃Aᵀ), (r, 1), and its bound.

    dropped: x̃ (rows, in). A: (r, in). B: (out, r). dout: G (rows, out).
    """
    u, ua, store = arithmetic.compute.roundoff, arithmetic.accumulator, arithmetic.store
    abs_x, abs_a, abs_b, abs_g = (np.abs(m) for m in (dropped, A, B, dout))
    p, h, K = dout @ B, dropped @ A.T, dout.T @ dropped  # rows, r; rows, r; out, in
    q, w = p.T @ dropped, dout.T @ h  # r, in; out, r
    p_paths, h_paths = abs_g @ abs_b, abs_x @ abs_a.T  # rows, r

    pi = (np.abs(p) * np.abs(h)).sum(axis=0)  # r, and so all below
    alpha_p, alpha_h = (p_paths * np.abs(h)).sum(axis=0), (np.abs(p) * h_paths).sum(axis=0)
    tau = (p_paths * h_paths).sum(axis=0)
    level_q, level_w = (np.abs(q) * abs_a).sum(axis=1), (abs_b * np.abs(w)).sum(axis=0)
    level_k = ((abs_b.T @ np.abs(K)) * abs_a).sum(axis=1)

    live_g, live_x = _live_rows(dout, B), _live_rows(dropped, A.T)  # rows, r
    n_rows = (live_g & live_x).sum(axis=0)
    n_out = np.sign(abs_b).sum(axis=0)
    n_in = np.sign(abs_a).sum(axis=1)
    orders = [
        ua * (n_out * alpha_p + n_rows * alpha_h + n_in * level_q) + store * (pi + level_q),
        ua * (n_out * alpha_p + n_in * alpha_h + n_rows * pi) + store * (2 * pi + pi),
        ua * (n_in * alpha_h + n_rows * alpha_p + n_out * level_w) + store * (pi + level_w),
        ua * (n_rows * tau + n_out * level_k + n_in * level_q) + store * (level_k + level_q),
        ua * (n_rows * tau + n_in * level_k + n_out * level_w) + store * (level_k + level_w),
    ]
    elementwise = u * np.maximum(level_q, level_w)  # q∘A, or B∘w, stored before it is summed
    anywhere = np.max([alpha_p, alpha_h, level_k, level_q, level_w, pi], axis=0)
    result = (q * A).sum(axis=1)
    scalars = scale.error(arithmetic)
    first_order = (
        np.max(orders, axis=0)
        + elementwise
        + scale.products * np.maximum(u * anywhere, arithmetic.io.roundoff * alpha_p)
        + u * (arithmetic.casts * (level_q + level_w) + dropout_roundings * alpha_h)
        + u * arithmetic.input_casts * (alpha_p + alpha_h)
        + (scalars + store) * np.abs(result)
    )
    kappa = (
        u * (dropout_roundings + 2 + 4 * arithmetic.casts + 2 * arithmetic.input_casts)
        + scalars
        + scale.products * max(u, arithmetic.io.roundoff)
        + ua * (n_rows + n_out + n_in)
    )
    relative = abs(scale.c) * (first_order + (np.expm1(kappa) - kappa) * tau)
    bound = relative + _underflow(dropped, A, B, dout, scale, arithmetic)
    return Bounded((scale.c * result)[:, None], np.where(n_rows[:, None] > 0, bound[:, None], 0.0))


def _live_rows(left: F64, right: F64) -> NDArray[np.bool_]:
    """Where left @ right has at least one non-zero product."""
    return (np.sign(np.abs(left)) @ np.sign(np.abs(right))) > 0


def _underflow(
    dropped: F64, A: F64, B: F64, dout: F64, scale: Scale, arithmetic: Arithmetic
) -> F64:
    """η of each place times what the rest of the loop multiplies it by; (r,)."""
    eta, eta_a = arithmetic.compute.underflow, FORMATS["float32"].underflow
    x, a, b, g = (np.abs(m) for m in (dropped, A, B, dout))
    nz_x, nz_a, nz_b, nz_g = (np.sign(m) for m in (x, a, b, g))
    p_paths, h_paths = g @ b, x @ a.T
    at_g = ((nz_g @ b) * h_paths).sum(axis=0)
    operands = (
        at_g
        + ((g @ nz_b) * h_paths).sum(axis=0)
        + (p_paths * (nz_x @ a.T)).sum(axis=0)
        + (p_paths * (x @ nz_a.T)).sum(axis=0)
    )
    longest = max(dropped.shape[0], A.shape[1], B.shape[0])
    each = STORES * eta + 2 * eta_a * longest
    at_p, at_h = h_paths.sum(axis=0), p_paths.sum(axis=0)
    at_q, at_w, at_k = a.sum(axis=1), b.sum(axis=0), b.sum(axis=0) * a.sum(axis=1)
    pairs = [at_p + at_q, at_p + at_h, at_h + at_w, at_k + at_q, at_k + at_w]
    # Beside two intermediates: the elementwise products of the last sum, and the result.
    intermediates = each * (np.max(pairs, axis=0) + longest + 1.0)
    io = arithmetic.io.underflow * scale.io_stores * at_g
    return np.asarray(scale.amplification * (STORES * eta * operands + intermediates) + io)

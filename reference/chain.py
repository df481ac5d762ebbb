"""The chain lemma: how far a computed product of three matrices is from the true one.

All of the adapter's tensors but dE are chains: delta = c X̃ A'ᵀ Bᵀ, dx = c G B A', dA = c BᵀGᵀX̃ ∘E
and dB = c GᵀX̃ A'ᵀ, where A' = A∘E. One lemma therefore bounds them all.

**Lemma.** Let Z = c L C R with L (m, a), C (a, b), R (b, o), and let a computed Ẑ come from either
association, with sums of products in any order, with or without FMA. Every rounding multiplies by
1 + δ whatever it touches, so Ẑ is the sum over paths (a, b) of c L_ma C_ab R_bo prod(1 + δ), where
a path meets each δ on its way. Expand the products. The terms of first order, by the place of
their δ, are bounded by that place's *level*: the sum, over the place's indices, of |what is
rounded there| |what the exact rest of the chain multiplies it by|:

    an entry of L, or of a stored C R               right  = |L| |C R|
    an entry of R, or of a stored L C               left   = |L C| |R|
    an entry of C                                   path   = |L| |C| |R|
    a scalar, or the result                         |Z|
    an accumulation of L C, ν_mb non-zero products  u_a (ν∘|L||C|) |R|
    ... of C R, ν_ao of them                        u_a |L| (ν∘|C||R|)  <=  u_a max(ν) path
    ... of (L C) R, ν_mo of them                    u_a ν∘left
    ... of L (C R), ν_m of them                     u_a ν∘right

(A sum of ν non-zero products in any order makes at most ν roundings of partial sums, none of which
exceeds the sum of magnitudes: one for the product, ν - 1 for the additions. Zeros add exactly.)
A row of L that holds powers of two only, a one-hot x above all, makes its products exactly: there
each of its sums rounds once less. The two associations exclude each other, so their costs enter by
their maximum. c (`Scale.products` multiplications) and E (one) may be applied to any operand, to
the intermediate or to the result; no level exceeds `path`, which is what they are charged. The
scalars that make c are numbers that we know, so what is lost on them is computed (`Scale.error`).
Terms of higher order are at most (e^κ - 1 - κ) path, κ being the sum of all charges along a path.

**Underflow.** A store moreover errs by η. What is stored may still lack any of s, 1/ρ' and E_b, so
the rest of the chain multiplies η by at most amplification = max(1, c, |s|, 1/ρ') and by
max(1, |E_b|). A place is stored at most four times: its cast, times E, times s, times 1/ρ'.

float64's own error, about (a + b + 16) 2^-53 path, is far inside the terms of higher order.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from reference.adapter import RANKNUM_OFFSET, Adapter
from reference.arithmetic import Arithmetic
from reference.formats import FLOAT64, FORMATS, power_of_two_below, round_to

__all__ = ["ChainBound", "Roundings", "Scale", "bound_chain", "triple"]

F64 = NDArray[np.float64]

STORES = 4  # cast, E, s, 1/rho': how often one place may be stored, see the module's docstring.
DROPOUT_ROUNDINGS = 3  # 1 - p, its reciprocal, and the product with x.


@dataclass(frozen=True)
class Scale:
    """c = s / ρ' of one adapter, with the two scalars that an implementation may apply apart."""

    scaling: float
    divisor: float  # ρ' = ρ + 1e-5

    @classmethod
    def of(cls, adapter: Adapter) -> Scale:
        """The scalars of an adapter."""
        return cls(float(adapter.scaling), float(adapter.ranknum) + RANKNUM_OFFSET)

    @property
    def c(self) -> float:
        """The factor that the contract multiplies by."""
        return self.scaling / self.divisor

    @property
    def products(self) -> int:
        """How often c is multiplied by: by s and by 1/ρ'; a power of two, or zero, rounds nothing."""
        return 1 if abs(np.frexp(self.scaling)[0]) in (0.0, 0.5) else 2

    @cache  # noqa: B019  a handful of frozen values, and no arrays
    def error(self, arithmetic: Arithmetic) -> float:
        """Relative error of c, or of s and 1/ρ', before they meet the chain.

        s may be taken into compute; ρ + 1e-5 may be formed exactly, in float32 or in compute, from a
        1e-5 that was rounded before or not. Each of these numbers is known, and so is the worst.
        Then one division rounds, to float32 and from there to compute: s / ρ', or 1 / ρ'.
        """
        compute, single = arithmetic.compute, FORMATS["float32"]
        offset = RANKNUM_OFFSET
        ranknum = self.divisor - offset
        sums = [float(round_to(ranknum + round_to(offset, f), single)) for f in (single, FLOAT64)]
        sums += [float(round_to(s, compute)) for s in sums]
        narrow = round_to(ranknum, compute) + round_to(offset, compute)
        sums.append(float(round_to(narrow, compute)))
        lost = max(abs(s - self.divisor) for s in sums) / abs(self.divisor)
        if self.scaling:
            s = self.scaling
            lost += abs(float(round_to(round_to(s, single), compute)) - s) / abs(s)
        return lost + compute.roundoff + (single.roundoff if arithmetic.narrow else 0.0)

    @property
    def amplification(self) -> float:
        """The most that the scalars still to be applied can multiply an error by."""
        return max(1.0, abs(self.c), abs(self.scaling), abs(1.0 / self.divisor))

    @property
    def io_stores(self) -> float:
        """Underflows of a value cast to io, then scaled there in two steps, each amplified."""
        return 1.0 + abs(self.c) + max(abs(self.scaling), abs(1.0 / self.divisor))


class Roundings(NamedTuple):
    """How often the operands of a chain, and its result, may be rounded to `compute`.

    `io_at`: where PEFT's kind of implementation applies c in the io format: on the result in the
    forward, on the incoming gradient in the backward, wherever that stands in the chain.
    """

    left: int
    centre: int
    right: int
    out: int
    io_at: Literal["left", "centre", "out"]


class ChainBound(NamedTuple):
    """Z (m, o), and what bounds |Ẑ - Z| <= relative + underflow, with three by-products.

    `path`: c |L||C||R|, the largest level. `last`: c |L C||R|, which no partial sum of (L C) R exceeds.
    `terms`: non-zero products of that sum, (m, o); zero where Ẑ is an exact zero.
    """

    value: F64
    relative: F64
    underflow: F64
    path: F64
    last: F64
    terms: F64


def triple(left: F64, centre: F64, right: F64) -> F64:
    """left @ centre @ right, by the cheaper of the two associations."""
    (m, a), (b, o) = left.shape, right.shape
    if m * b * (a + o) <= a * o * (b + m):
        return np.asarray((left @ centre) @ right)
    return np.asarray(left @ (centre @ right))


def bound_chain(
    left: F64,
    centre: F64,
    right: F64,
    singular: F64,
    scale: Scale,
    roundings: Roundings,
    arithmetic: Arithmetic,
) -> ChainBound:
    """The lemma above for Z = c left @ (centre∘singular) @ right.

    left: (m, a). centre: (a, b). right: (b, o). singular: (b,), E where it stands between centre
    and right, ones where it is applied outside of the chain.
    """
    u, ua, store = arithmetic.compute.roundoff, arithmetic.accumulator, arithmetic.store
    live = (singular != 0).astype(np.float64)
    abs_l, abs_c, abs_r = np.abs(left), np.abs(centre), np.abs(right)
    nz_l, nz_c, nz_r = (np.sign(a) for a in (abs_l, abs_c * live, abs_r))
    folded = centre * singular

    first = left @ folded  # m, b: the stored L C
    value = first @ right  # m, o
    out_level = np.abs(value)
    left_level = np.abs(first) @ abs_r
    right_level = abs_l @ np.abs(folded @ right)
    path = triple(abs_l, np.abs(folded), abs_r)

    inner = nz_l @ nz_c  # m, b: non-zero products of each entry of L C
    terms = np.sign(inner) @ nz_r  # m, o: of each entry of (L C) R
    ranks = float(np.count_nonzero(np.any(nz_c, axis=0) & np.any(nz_r, axis=1)))
    width = nz_l.sum(axis=1, keepdims=True)  # m, 1: at least the non-zero products in L (C R)
    exact = np.all(power_of_two_below(abs_l) == abs_l, axis=1, keepdims=True)  # m, 1
    rounded = np.maximum(inner - exact, 0.0)
    accumulation = np.maximum(
        ua * ((rounded * (abs_l @ np.abs(folded))) @ abs_r + terms * left_level)
        + store * left_level,
        ua * (ranks * path + np.maximum(width - exact, 0.0) * right_level) + store * right_level,
    )

    io_level = {"left": right_level, "centre": path, "out": out_level}[roundings.io_at]
    scaling = scale.products * np.maximum(u * path, arithmetic.io.roundoff * io_level)
    scalars = scale.error(arithmetic)
    first_order = (
        accumulation
        + scaling
        + u * (roundings.left * right_level + roundings.right * left_level)
        + u * (roundings.centre + 1) * path  # + 1: E
        + (u * roundings.out + scalars + arithmetic.input_casts * store) * out_level
    )
    counts = sum(roundings[:4]) + 1 + 3 * int(arithmetic.narrow)
    kappa = (
        u * counts
        + scalars
        + scale.products * max(u, arithmetic.io.roundoff)
        + ua * (inner.max(initial=0.0) + width.max(initial=0.0) + ranks + terms.max(initial=0.0))
    )
    higher_order = (np.expm1(kappa) - kappa) * path

    return ChainBound(
        value=scale.c * value,
        relative=abs(scale.c) * (first_order + higher_order),
        underflow=_underflow(
            (abs_l, abs_c, abs_r), singular, inner, terms, ranks, scale, roundings, arithmetic
        ),
        path=abs(scale.c) * path,
        last=abs(scale.c) * left_level,
        terms=terms,
    )


def _underflow(
    magnitudes: tuple[F64, F64, F64],
    singular: F64,
    inner: F64,
    terms: F64,
    ranks: float,
    scale: Scale,
    roundings: Roundings,
    arithmetic: Arithmetic,
) -> F64:
    """The absolute part: each place's η times what the rest of the chain multiplies it by."""
    abs_l, abs_c, abs_r = magnitudes
    eta, eta_a = arithmetic.compute.underflow, FORMATS["float32"].underflow
    live = (singular != 0).astype(np.float64)
    weight = np.maximum(1.0, np.abs(singular)) * live  # b
    nz_l, nz_c, nz_r = (np.sign(a) for a in (abs_l, abs_c, abs_r))
    weighted, places = abs_c * weight, nz_c * weight

    at_left = triple(nz_l, weighted, abs_r)
    at_centre = triple(abs_l, places, abs_r)
    at_right = triple(abs_l, weighted, nz_r)
    at_singular = triple(abs_l, abs_c * live, abs_r)
    at_first = (np.sign(inner) * weight * (STORES * eta + 2 * eta_a * inner)) @ abs_r
    live_a, live_o = places.any(axis=1).astype(np.float64), nz_r.any(axis=0).astype(np.float64)
    at_second = (STORES * eta + 2 * eta_a * ranks) * np.outer(abs_l @ live_a, live_o)
    longest = np.maximum(terms, nz_l.sum(axis=1, keepdims=True))
    at_out = np.sign(terms) * (STORES * eta + 2 * eta_a * longest)
    total = scale.amplification * (
        STORES * eta * (at_left + at_centre + at_right)
        + eta * at_singular
        + np.maximum(at_first, at_second)
        + at_out
    )
    at_io = {"left": at_left, "centre": at_centre, "out": np.sign(terms)}[roundings.io_at]
    return np.asarray(total + arithmetic.io.underflow * scale.io_stores * at_io)

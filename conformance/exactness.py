"""The certificate of the exact lane: when every conforming evaluation gives the same bits, and why.

**Data.** Call a case dyadic if the entries of x, dout, A and B are integers, if the entries of E that
are not zero are powers of two, up to sign, and if so are s, ρ' = ρ + 1e-5 (as formed in single
precision, or in double and rounded to single) and therefore c = s / ρ'.

**Claim.** Let T, for an element of y, dx, dA, dE or dB, be the sum of the magnitudes of everything
that is added up in it: |base| if it has one, and |c x A E B| along each path (or |c dout ...|). Let q
be the *quantum* min(1, c) min(1, |E|), the smallest over all adapters. If q divides the base output
(or gradient) and T <= 2^p q, for p the bits of the significand of the narrowest format that may store
anything, then no evaluation of the contract rounds on its way to that element, and its bits are the
true value's.

**Proof.** Multiplying by a power of two is exact, so where E, c, s and 1/ρ' are applied, apart or
folded together, and whether one divides by ρ' or multiplies by its inverse, changes exponents only.
(1 / ρ' is a power of two itself.) It is therefore enough to look at an evaluation that applies none
of them too early, and at what it stores up to a factor 2^k: each stored number, each cast of an
operand and each partial sum of an accumulation, in any order and grouping, is such a factor times a
sum, with signs, over *some* of the indices of a product of some of the matrices. Let v be that
number, and let it matter to the element: the rest of the chain, of magnitudes, multiplies it by at
least one path that is not zero. If there is none, v meets a factor that is exactly zero, and rounding
it is harmless.

- v without E in it is an integer. The rest of a path that is not zero is at least c min |E|, being
  a product of non-zero integers, a singular value and c (of c alone in dE, where E takes no part).
  Every path through v is counted in T, so |v| c |E| <= (the sum of the magnitudes in v) c |E| <= T
  <= 2^p q <= 2^p c |E|: v is an integer of at most 2^p, which has p bits. That is the hidden vector
  x Aᵀ, dout B, the products doutᵀ x, (dout B)ᵀ x and doutᵀ (x Aᵀ), and each partial sum of one of
  them.
- v with E in it, summed over ranks that differ in E (the dense B (A∘E), partial sums over the
  rank), is a multiple of min |E|, or of min(1, |E|), and |v| c <= T <= 2^p q, where q / c <= min(1,
  |E|): p bits again.
- v with c in it is a multiple of q, as is the base, so partial sums that start from the base, as in
  addmm, of one adapter or of several stacked, are multiples of q of at most T: p bits.

Whatever is stored therefore has at most p bits, and single precision, in which sums are accumulated,
has more. Left over is the exponent: `in_range` asks that q, and T, times the scalars that may still
be missing, are normal numbers of the format with room to spare. ∎

Hence zero tolerance: a difference in any bit is a fault, be it 1e-5 that is missing from the divisor,
a scale that is doubled, or a mask that is shifted by one. Dropout is not covered (1 / (1 - p) is a
power of two for p = 1/2 only), and neither is a base that the port evaluates otherwise than the twin.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch

__all__ = ["Dyadic"]

# Significant bits that a format holds exactly, the leading one included; exponents of its normal range.
_SIGNIFICANT_BITS = {torch.float32: 24, torch.bfloat16: 8, torch.float16: 11}
_EXPONENTS = {torch.float32: (-126, 127), torch.bfloat16: (-126, 127), torch.float16: (-14, 15)}


@dataclass(frozen=True)
class Dyadic:
    """What one or several adapters contribute to the certificate: the powers of two in them.

    scalings, divisors: s and ρ' of each adapter. singular: the entries of E, of all adapters, flat.
    """

    scalings: tuple[float, ...]
    divisors: tuple[float, ...]
    singular: np.ndarray

    def applies(self, integers: Iterable[np.ndarray]) -> bool:
        """Whether the case is dyadic; `integers` are x, the A and B, and dout if there is one."""
        powers = np.concatenate([self.scalings, self.divisors, self.singular[self.singular != 0]])
        mantissas, _ = np.frexp(np.abs(powers))
        return bool(np.all(mantissas == 0.5)) and all(
            bool(np.all(a == np.rint(a))) for a in integers
        )

    @property
    def quantum(self) -> float:
        """q: whatever is added to the base is a multiple of it."""
        c = [abs(s / d) for s, d in zip(self.scalings, self.divisors, strict=True)]
        live = np.abs(self.singular[self.singular != 0])
        return float(min([1.0, *c]) * live.min(initial=1.0))

    def certifies(self, total: np.ndarray, given: np.ndarray, dtype: torch.dtype) -> bool:
        """Whether nothing can be rounded on the way to an array.

        total: T, the sum of the magnitudes in each element. given: the base's part, zero where there
        is none. dtype: the narrowest format that may store an intermediate.
        """
        whole = given / self.quantum
        largest = float(total.max(initial=0.0))
        return (
            bool((whole == np.rint(whole)).all())
            and largest <= self.quantum * 2.0 ** _SIGNIFICANT_BITS[dtype]
            and self.in_range(largest, dtype)
        )

    def in_range(self, largest: float, dtype: torch.dtype) -> bool:
        """Whether every number stored is normal: with s or 1/ρ' to come, or applied on its own."""
        low, high = _EXPONENTS[dtype]
        scalars = [1.0]
        for s, d in zip(self.scalings, self.divisors, strict=True):
            scalars += [abs(s), abs(1.0 / d), abs(d / s), abs(d)]
        live = np.abs(self.singular[self.singular != 0])
        smallest = self.quantum * min(scalars)
        greatest = max(largest, 1.0) * max(scalars) * max(1.0, 1.0 / float(live.min(initial=1.0)))
        return smallest >= 2.0**low and greatest <= 2.0**high

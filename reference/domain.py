"""Where the bounds apply: no value that a conforming implementation may store leaves its range.

Overflow has clauses of its own. A case is in the domain if each place's true value, plus what its
computed value may exceed it by, is at most half of the largest finite number of the format that
may hold it, and if the scalars are normal numbers there. Places are those of `reference.chain`: A,
B and their products with E, the hidden vector, the dense B A', the delta, and what the scalars s,
1/ρ' and c make of them; partial sums of y. Under a strict arithmetic only the delta and y are in
io, all else in float32. A scaled x is not counted: nobody scales the widest operand.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from reference.adapter import Adapter, in_float64
from reference.arithmetic import Arithmetic
from reference.chain import Scale, triple
from reference.formats import FORMATS, Format

__all__ = ["gradients_in_domain", "in_domain"]

F64 = NDArray[np.float64]
Place = tuple[Format, F64]

# More roundings than any place of `reference.chain` gathers before it is stored.
ROUNDINGS = 16


def in_domain(x: F64, adapters: Sequence[Adapter], base: F64, arithmetic: Arithmetic) -> bool:
    """Whether `bound_output` may judge this case. x: (..., in). base: (..., out)."""
    base = np.asarray(base, dtype=np.float64)
    total = np.abs(base.reshape(-1, base.shape[-1]))
    for adapter in map(in_float64, adapters):
        scale = Scale.of(adapter)
        rows = adapter.dropped(np.asarray(x, dtype=np.float64)).reshape(-1, adapter.A.shape[1])
        folded = adapter.A * adapter.E
        if not _scalars_fit(scale, arithmetic):
            return False
        places = [
            *_operands(rows, adapter, scale, arithmetic),
            *_product(rows, adapter.A.T, scale, arithmetic),
            *_product(rows, folded.T, scale, arithmetic),
            *_product(adapter.B, folded, scale, arithmetic),
            *_result(rows, folded.T, adapter.B.T, scale, arithmetic),
        ]
        if not all(_fits(place) for place in places):
            return False
        total = total + abs(scale.c) * triple(np.abs(rows), np.abs(folded).T, np.abs(adapter.B).T)
    return _fits((arithmetic.io, total))


def gradients_in_domain(
    x: F64, adapters: Sequence[Adapter], dout: F64, base_dx: F64 | None, arithmetic: Arithmetic
) -> bool:
    """Whether `bound_gradients` may judge this case; the forward's domain is a matter of its own.

    x: (..., in). dout: (..., out). base_dx: (..., in) or None.
    """
    x, dout = np.asarray(x, dtype=np.float64), np.asarray(dout, dtype=np.float64)
    total = np.abs((np.zeros_like(x) if base_dx is None else base_dx).reshape(-1, x.shape[-1]))
    for adapter in map(in_float64, adapters):
        scale = Scale.of(adapter)
        rows = adapter.dropped(x).reshape(-1, adapter.A.shape[1])
        grad = dout.reshape(-1, adapter.B.shape[0])
        folded, weighted = adapter.A * adapter.E, adapter.B * adapter.E.T
        if not _scalars_fit(scale, arithmetic):
            return False
        places = [
            *_operands(rows, adapter, scale, arithmetic),
            (arithmetic.io, scale.amplification * np.abs(grad)),
            *_product(grad, adapter.B, scale, arithmetic),
            *_product(grad, weighted, scale, arithmetic),
            *_product(rows, adapter.A.T, scale, arithmetic),
            *_product(rows, folded.T, scale, arithmetic),
            *_product(grad.T, rows, scale, arithmetic),
            *_leaf(adapter.B.T, grad.T, rows, scale, arithmetic),
            *_leaf(weighted.T, grad.T, rows, scale, arithmetic),
            *_leaf(grad.T, rows, adapter.A.T, scale, arithmetic),
            *_leaf(grad.T, rows, folded.T, scale, arithmetic),
            *_result(grad, adapter.B, folded, scale, arithmetic),
            *_singular(rows, adapter, grad, scale, arithmetic),
        ]
        if not all(_fits(place) for place in places):
            return False
        spread = abs(scale.c) / (1.0 - adapter.p)
        total = total + spread * triple(np.abs(grad), np.abs(adapter.B), np.abs(folded))
    return _fits((arithmetic.io, total))


def _fits(place: Place) -> bool:
    """Whether every magnitude is at most half of the format's largest number; NaN is not."""
    fmt, magnitude = place
    return bool(np.all(magnitude <= fmt.largest / 2))


def _scalars_fit(scale: Scale, arithmetic: Arithmetic) -> bool:
    """Whether s, ρ', 1/ρ' and c are zero or normal numbers of the compute format."""
    fmt = arithmetic.compute
    scalars = np.abs([scale.scaling, scale.divisor, 1.0 / scale.divisor, scale.c])
    normal = (scalars >= fmt.smallest_normal) & (scalars <= fmt.largest / 2)
    return bool(np.all(normal | (scalars == 0)))


def _operands(rows: F64, adapter: Adapter, scale: Scale, arithmetic: Arithmetic) -> Iterator[Place]:
    """x̃, and A and B with and without E and the scalars."""
    fmt = arithmetic.compute
    yield fmt, np.abs(rows)
    yield fmt, np.abs(adapter.E)
    for matrix, singular in ((adapter.A, adapter.E), (adapter.B, adapter.E.T)):
        yield fmt, scale.amplification * np.abs(matrix)
        yield fmt, scale.amplification * np.abs(matrix * singular)


def _product(left: F64, right: F64, scale: Scale, arithmetic: Arithmetic) -> Iterator[Place]:
    """A stored intermediate left @ right, and the float32 accumulation that made it."""
    paths = np.abs(left) @ np.abs(right)
    yield FORMATS["float32"], scale.amplification * paths
    error = ROUNDINGS * arithmetic.compute.roundoff + left.shape[1] * arithmetic.accumulator
    yield arithmetic.compute, scale.amplification * (np.abs(left @ right) + error * paths)


def _result(
    left: F64, centre: F64, right: F64, scale: Scale, arithmetic: Arithmetic
) -> Iterator[Place]:
    """A chain's result before, between and after the scalars, as stored in io."""
    paths = triple(np.abs(left), np.abs(centre), np.abs(right))
    yield FORMATS["float32"], scale.amplification * paths
    length = left.shape[1] + right.shape[0]
    error = ROUNDINGS * arithmetic.compute.roundoff + length * arithmetic.accumulator
    value = np.abs(triple(left, centre, right))
    yield arithmetic.io, scale.amplification * (value + error * paths)


def _leaf(
    left: F64, centre: F64, right: F64, scale: Scale, arithmetic: Arithmetic
) -> Iterator[Place]:
    """A parameter's gradient, which is stored in the compute format at worst."""
    for _, magnitude in _result(left, centre, right, scale, arithmetic):
        yield arithmetic.compute, magnitude


def _singular(
    rows: F64, adapter: Adapter, grad: F64, scale: Scale, arithmetic: Arithmetic
) -> Iterator[Place]:
    """dE, as a sum of magnitudes: it is a scalar for each rank, so nothing is lost by that."""
    paths = (np.abs(grad) @ np.abs(adapter.B)) * (np.abs(rows) @ np.abs(adapter.A).T)
    yield arithmetic.compute, scale.amplification * paths.sum(axis=0)

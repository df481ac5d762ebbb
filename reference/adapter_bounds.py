"""Error bounds, per element, for the adapter's output and for each of its gradients.

What they cover: every evaluation of the contract that rounds no more than its `Arithmetic` allows,
whatever the order of sums and products, wherever E and c are folded, adapters one by one or
stacked, added to the base output in the io format or in the accumulator. The base output and the
gradient that reaches x through the base are data here (the "given base" lane).

Left out: an evaluation that starts the sum over `in` from the base output, as addmm(base, x, Vᵀ)
with V = B A' might; the base may only start the sum over the rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from reference.adapter import Adapter, AdapterGradients, in_float64
from reference.arithmetic import Arithmetic, Bounded
from reference.chain import DROPOUT_ROUNDINGS, ChainBound, Roundings, Scale, bound_chain
from reference.formats import FORMATS, power_of_two_below
from reference.singular import bound_singular

__all__ = ["bound_gradients", "bound_output"]

F64 = NDArray[np.float64]


def bound_output(x: F64, adapters: Sequence[Adapter], base: F64, arithmetic: Arithmetic) -> Bounded:
    """y = base + the sum of deltas, and its bound; both (..., out).

    x: (..., in) and base: (..., out), float64 arrays of values that `arithmetic.io` holds exactly.
    Each delta is the chain X̃ · A'ᵀ · Bᵀ. Where no path of any adapter is alive the bound is zero:
    y must then be the base output itself.
    """
    base = np.asarray(base, dtype=np.float64)
    deltas = [_delta(np.asarray(x, dtype=np.float64), in_float64(a), arithmetic) for a in adapters]
    summed = _add_to(base.reshape(-1, base.shape[-1]), deltas, arithmetic)
    return Bounded(summed.value.reshape(base.shape), summed.bound.reshape(base.shape))


def bound_gradients(
    x: F64,
    adapters: Sequence[Adapter],
    dout: F64,
    base_dx: F64 | None,
    arithmetic: Arithmetic,
) -> tuple[Bounded, list[AdapterGradients]]:
    """dx with its bound, and per adapter an `AdapterGradients` whose four fields are `Bounded`.

    x: (..., in). dout: (..., out). base_dx: (..., in), or None for zeros; all exact in `io`.
    The first result is base_dx + the sum of the adapters' dx, each of which may be cast to io and
    accumulated there in any order. The adapters' own `dx` is the contribution alone. dA, dE and dB
    are leaves in float32; under a permissive arithmetic the products that made them may have been
    stored in io. With Q = BᵀGᵀX̃, dA = c Q∘E: whatever bounds Q, bounds dA times |E|, but for
    underflow, where E may have come first, so that max(1, |E|) takes its place.
    """
    x, dout = np.asarray(x, dtype=np.float64), np.asarray(dout, dtype=np.float64)
    start = np.zeros_like(x) if base_dx is None else np.asarray(base_dx, dtype=np.float64)
    leaves, contributions = [], []
    for adapter in map(in_float64, adapters):
        contribution = _dx(x, dout, adapter, arithmetic)
        contributions.append(contribution)
        leaves.append(
            AdapterGradients(
                dx=Bounded(
                    contribution.value.reshape(x.shape), contribution.bound.reshape(x.shape)
                ),
                dA=_dA(x, dout, adapter, arithmetic),
                dE=_dE(x, dout, adapter, arithmetic),
                dB=_dB(x, dout, adapter, arithmetic),
            )
        )
    summed = _add_to(start.reshape(-1, x.shape[-1]), contributions, arithmetic)
    return Bounded(summed.value.reshape(x.shape), summed.bound.reshape(x.shape)), leaves


class _Contribution(NamedTuple):
    """An addend in the io format, (rows, n), with what stacking it with others needs to know.

    terms: non-zero products of its last sum. path, last: its c |L||C||R| and c |L C||R|, see
    `reference.chain`.
    """

    value: F64
    bound: F64
    terms: F64
    path: F64
    last: F64


def _add_to(base: F64, parts: Sequence[_Contribution], arithmetic: Arithmetic) -> Bounded:
    """base + the sum of parts, in any order, in io or in the accumulator.

    N addends that are not zero take N - 1 additions. The last rounds the result, by half a unit in
    the last place of a number up to |y| + error, which is u times a power of two; the others round
    partial sums, at most |base| + sum |parts| each. If the base starts the accumulator, the sums over
    the rank (of all adapters at once, if they are stacked) carry it along: where a partial sum was
    at most P = c |L C||R| and charged u_a P, it is up to |base| + P, and is rounded by u_a times the
    power of two below that.
    Stacked adapters also share one sum over all their ranks, or one dense weight: each path then
    meets the other adapters' ν, and K - 1 stores of the sums of K dense weights.
    """
    u, eta = arithmetic.io.roundoff, arithmetic.io.underflow
    value, error = base.copy(), np.zeros_like(base)
    magnitude, terms = np.abs(base), np.zeros_like(base)
    alone = np.zeros_like(base)
    addends = (base != 0).astype(np.float64)
    for part in parts:
        value += part.value
        error += part.bound
        magnitude += np.abs(part.value) + part.bound
        terms += part.terms
        alone += part.last
        addends += np.sign(part.terms)
    additions = np.maximum(addends - 1.0, 0.0)
    partial = ((1.0 + u) ** np.maximum(additions - 1.0, 0.0) - 1.0) * magnitude
    ua = arithmetic.accumulator
    carried = power_of_two_below(np.abs(base) + alone) - alone
    started = ua * terms * np.where(base != 0, np.maximum(carried, 0.0), 0.0)
    others = np.maximum(addends - (base != 0) - 1.0, 0.0) * arithmetic.store
    stacked = sum(
        ((ua * (terms - part.terms) + others) * part.path for part in parts), np.zeros_like(base)
    )
    error = error + partial + (started + stacked) / (1.0 - ua * terms)
    last = np.sign(additions) * u * power_of_two_below(np.abs(value) + error)
    bound = error + last + additions * eta
    return Bounded(value, np.where(terms > 0, bound, 0.0))


def _to_io(chain: ChainBound, arithmetic: Arithmetic) -> _Contribution:
    """The chain's result cast to io; what float32 accumulated, float32 holds as it is."""
    io = arithmetic.io
    u = io.roundoff if io.precision < FORMATS["float32"].precision else 0.0
    error = chain.relative + chain.underflow
    error = error + u * power_of_two_below(np.abs(chain.value) + error) + io.underflow
    return _Contribution(
        chain.value, np.where(chain.terms > 0, error, 0.0), chain.terms, chain.path, chain.last
    )


def _rows(a: F64, width: int) -> F64:
    """All leading dimensions as one: (rows, width)."""
    return a.reshape(-1, width)


def _dropout(adapter: Adapter) -> int:
    """How often an element is rounded on its way through the adapter's dropout."""
    return 0 if adapter.keep is None else DROPOUT_ROUNDINGS


def _delta(x: F64, adapter: Adapter, arithmetic: Arithmetic) -> _Contribution:
    """delta = c X̃ · (A∘E)ᵀ · Bᵀ. E's cast rescales one rank, so it counts with B's."""
    casts, inputs = arithmetic.casts, arithmetic.input_casts
    chain = bound_chain(
        _rows(adapter.dropped(x), adapter.A.shape[1]),
        adapter.A.T,
        adapter.B.T,
        adapter.E[:, 0],
        Scale.of(adapter),
        Roundings(inputs + _dropout(adapter), centre=casts, right=2 * casts, out=0, io_at="out"),
        arithmetic,
    )
    return _to_io(chain, arithmetic)


def _dx(x: F64, dout: F64, adapter: Adapter, arithmetic: Arithmetic) -> _Contribution:
    """dx = (c G · B·E · A)∘keep / (1 - p). Dropout scales the result, errors included."""
    casts, inputs = arithmetic.casts, arithmetic.input_casts
    chain = bound_chain(
        _rows(dout, adapter.B.shape[0]),
        adapter.B,
        adapter.A,
        adapter.E[:, 0],
        Scale.of(adapter),
        Roundings(inputs, centre=casts, right=2 * casts, out=_dropout(adapter), io_at="left"),
        arithmetic,
    )
    if adapter.keep is not None:
        survival = adapter.keep.reshape(chain.value.shape) / (1.0 - adapter.p)
        chain = ChainBound(
            value=chain.value * survival,
            relative=chain.relative * survival,
            underflow=(chain.underflow + arithmetic.compute.underflow) * survival,
            path=chain.path * survival,
            last=chain.last * survival,
            terms=chain.terms * np.sign(survival),
        )
    return _to_io(chain, arithmetic)


def _dA(x: F64, dout: F64, adapter: Adapter, arithmetic: Arithmetic) -> Bounded:
    """dA = c Bᵀ · Gᵀ · X̃ ∘E; E's cast and E's product are both roundings of the result's kind."""
    casts, inputs = arithmetic.casts, arithmetic.input_casts
    rows = _rows(dout, adapter.B.shape[0])
    chain = bound_chain(
        adapter.B.T,
        rows.T,
        _rows(adapter.dropped(x), adapter.A.shape[1]),
        np.ones(rows.shape[0]),
        Scale.of(adapter),
        Roundings(casts, inputs, inputs + _dropout(adapter), casts, io_at="centre"),
        arithmetic,
    )
    return _times_singular(chain, adapter.E, arithmetic)


def _dB(x: F64, dout: F64, adapter: Adapter, arithmetic: Arithmetic) -> Bounded:
    """dB = c Gᵀ · X̃ · Aᵀ ∘Eᵀ."""
    casts, inputs = arithmetic.casts, arithmetic.input_casts
    chain = bound_chain(
        _rows(dout, adapter.B.shape[0]).T,
        _rows(adapter.dropped(x), adapter.A.shape[1]),
        adapter.A.T,
        np.ones(adapter.A.shape[1]),
        Scale.of(adapter),
        Roundings(inputs, inputs + _dropout(adapter), casts, casts, io_at="left"),
        arithmetic,
    )
    return _times_singular(chain, adapter.E.T, arithmetic)


def _times_singular(chain: ChainBound, singular: F64, arithmetic: Arithmetic) -> Bounded:
    """Z∘E for a chain whose output carries the rank's index; singular broadcasts to Z."""
    live = (singular != 0) & (chain.terms > 0)
    underflow = (chain.underflow * np.maximum(1.0, np.abs(singular))) + (
        arithmetic.compute.underflow * (2.0 + chain.path)
    )
    value = chain.value * singular
    bound = chain.relative * np.abs(singular) + arithmetic.store * np.abs(value) + underflow
    return Bounded(value, np.where(live, bound, 0.0))


def _dE(x: F64, dout: F64, adapter: Adapter, arithmetic: Arithmetic) -> Bounded:
    """dE, (r, 1): see `reference.singular`."""
    return bound_singular(
        _rows(adapter.dropped(x), adapter.A.shape[1]),
        adapter.A,
        adapter.B,
        _rows(dout, adapter.B.shape[0]),
        Scale.of(adapter),
        _dropout(adapter),
        arithmetic,
    )

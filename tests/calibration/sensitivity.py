"""The smallest relative fault of delta that the bounds see: by dtype, arithmetic and size."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from conformance.case import DTYPES, DType
from reference import Adapter, Arithmetic, bound_output, round_to
from tests.calibration.judging import RULES, Rule

IN_FEATURES = (4, 64, 512, 4096)
RANKS = (1, 8, 64)
ROWS, OUT = 8, 32
DRAWS = 11


@dataclass(frozen=True)
class Sensitivity:
    """Relative faults: delta multiplied by 1 + ε, at every element alike.

    certain: with ε of this size each of the layers drawn is rejected, whatever the roundings of an
        implementation that conforms but for the fault: 2 min (bound / |delta|), since they may hide
        as much as the bound.
    usual: half of the layers drawn are rejected if nothing is rounded: min (bound / |delta|).
    beside_base: as `usual`, with a base output of order one instead of zero.
    probe: as `certain`, for a one-hot x with one live rank.
    """

    dtype: DType
    rule: Rule
    in_features: int
    rank: int
    certain: float
    usual: float
    beside_base: float
    probe: float


def sensitivities(seed: int = 0, sizes: Sequence[int] = IN_FEATURES) -> Iterator[Sensitivity]:
    """For every dtype, arithmetic and size; seconds, not minutes."""
    for dtype in DTYPES:
        for rule in RULES[:1] if dtype == "float32" else RULES:
            arithmetic: Arithmetic = getattr(Arithmetic, rule)(dtype)
            for n in sizes:
                for rank in RANKS:
                    yield _of(dtype, rule, arithmetic, n, rank, seed)


def _of(
    dtype: DType, rule: Rule, arithmetic: Arithmetic, n: int, rank: int, seed: int
) -> Sensitivity:
    near_zero, beside, probed = [], [], []
    for draw in range(DRAWS):
        rng = np.random.default_rng([seed, draw, n, rank])
        x = round_to(rng.standard_normal((ROWS, n)), dtype)
        A, E, B = (rng.standard_normal(s) for s in ((rank, n), (rank, 1), (OUT, rank)))
        parts = [round_to(m, "float32") for m in (A / np.sqrt(n), E, B)]
        adapter = Adapter(*parts, scaling=16.0, ranknum=float(rank))
        base = round_to(rng.standard_normal((ROWS, OUT)), dtype)
        near_zero.append(_smallest(x, adapter, 0.0 * base, arithmetic))
        beside.append(_smallest(x, adapter, base, arithmetic))
        one_hot, live = np.eye(n)[rng.integers(n, size=ROWS)], np.eye(rank)[:, :1]
        probe = Adapter(parts[0], parts[1] * live, parts[2], scaling=16.0, ranknum=float(rank))
        probed.append(_smallest(one_hot, probe, 0.0 * base, arithmetic))
    return Sensitivity(
        dtype,
        rule,
        n,
        rank,
        certain=2.0 * max(near_zero),
        usual=float(np.median(near_zero)),
        beside_base=float(np.median(beside)),
        probe=2.0 * max(probed),
    )


def _smallest(x: np.ndarray, adapter: Adapter, base: np.ndarray, arithmetic: Arithmetic) -> float:
    """min bound / |delta| over the elements of y."""
    value, bound = bound_output(x, [adapter], base, arithmetic)
    delta = np.abs(value - base)
    return float(np.min(bound[delta > 0] / delta[delta > 0]))

"""The cases of a calibration run: the suite's own families and sizes, one case for each number."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import numpy as np

from conformance.case import DTYPES, Case
from conformance.spec import KINDS
from conformance.strategies import (
    ALPHAS,
    BATCHES,
    IN_FEATURES,
    OUT_FEATURES,
    RANDOM_VALUES,
    RANKS,
)

T = TypeVar("T")

# Mostly what the layer starts with; else what training with another rank left there, and one below 1.
RANKNUMS = (12.0, 8.0, 1.0, 0.5)
DROPOUTS = (0.1, 0.5)


def case_of(seed: int, number: int) -> Case:
    """Case `number` of the run with this seed; dtype and kind go round, all else is drawn."""
    rng = np.random.default_rng([seed, number])

    def one(options: Sequence[T]) -> T:
        return options[int(rng.integers(len(options)))]

    count = 1 + int(rng.random() < 0.3)
    in_features, out_features = one(IN_FEATURES), one(OUT_FEATURES)
    # bitsandbytes takes a 4-bit weight of a single byte for a transposed one.
    while in_features * out_features <= 2:
        in_features, out_features = one(IN_FEATURES), one(OUT_FEATURES)
    return Case(
        kind=KINDS[number % 2],
        dtype=DTYPES[number // 2 % 3],
        in_features=in_features,
        out_features=out_features,
        batch=one(BATCHES),
        ranks=tuple(one(RANKS) for _ in range(count)),
        alphas=tuple(one(ALPHAS) for _ in range(count)),
        ranknums=tuple(one(RANKNUMS) for _ in range(count)) if rng.random() < 0.3 else (),
        dropouts=tuple(one(DROPOUTS) for _ in range(count)) if rng.random() < 0.2 else (),
        values=one(RANDOM_VALUES),
        base_scale=one((1.0, 2.0**-10)),
        bias=rng.random() < 0.5,
        training=rng.random() < 0.8,
        quant_type="nf4" if rng.random() < 0.5 else "fp4",
        double_quant=rng.random() < 0.5,
        seed=int(rng.integers(2**16)),
    )


def masks_of(case: Case) -> dict[str, np.ndarray]:
    """What each adapter's dropout keeps of x in this case, (*batch, in); empty without dropout."""
    if not case.dropouts:
        return {}
    rng = np.random.default_rng([case.seed, case.in_features, 7])
    return {
        name: rng.random((*case.batch, case.in_features)) >= case.dropout(index)
        for index, name in enumerate(case.names)
    }

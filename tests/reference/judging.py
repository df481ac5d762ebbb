"""Comparing what an implementation gave with a `Bounded`, and asking whether a fault is seen."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from reference import Bounded


def ratio(got: NDArray[np.floating], expected: Bounded) -> float:
    """The worst error / bound; 0 for nothing to compare, infinite for NaN or a lost exact zero."""
    assert got.shape == expected.value.shape == expected.bound.shape
    error = np.abs(got - expected.value)
    if not got.size:
        return 0.0
    if not np.isfinite(error).all() or not (expected.bound >= 0).all():
        return np.inf
    if (error[expected.bound == 0] > 0).any():
        return np.inf
    return float(np.max(error / np.where(expected.bound > 0, expected.bound, 1.0)))


def worst(pairs: Iterable[tuple[NDArray[np.floating], Bounded]]) -> float:
    """The worst ratio of several."""
    return max((ratio(got, expected) for got, expected in pairs), default=0.0)

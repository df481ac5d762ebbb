"""How near a clause's comparisons came to their bounds: a small histogram per dtype."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

BINS = 20


@dataclass(frozen=True)
class Margin:
    """Error / bound over the comparisons of one dtype, each comparison by its worst element.

    `bins` counts them in `BINS` equal steps from 0 to 1, and in one more beyond 1: a comparison
    that meets its bound exactly passes, and is in the last step. `median` and `worst` are
    infinite where an error met a bound of zero.
    """

    dtype: str
    count: int
    median: float
    worst: float
    bins: tuple[int, ...]

    def __post_init__(self) -> None:
        # A margin that travelled as JSON comes back with a list.
        object.__setattr__(self, "bins", tuple(self.bins))

    @classmethod
    def of(cls, dtype: str, ratios: Sequence[float]) -> Margin:
        """The margin of comparisons whose worst elements had these ratios; at least one."""
        values = np.sort(np.asarray(ratios, dtype=np.float64))
        edges = np.arange(BINS + 1) / BINS
        inside, _ = np.histogram(values[values <= 1.0], bins=edges)
        middle = values[[(len(values) - 1) // 2, len(values) // 2]]
        # Not np.median: the mean of two infinities is one, and warns.
        median = float(middle[0] if middle[0] == middle[1] else middle.mean())
        bins = (*map(int, inside), int((values > 1.0).sum()))
        return cls(dtype, len(values), median, float(values[-1]), bins)


def margins(ratios: Mapping[str, Sequence[float]]) -> tuple[Margin, ...]:
    """A margin for each dtype that was compared, in the order of the dtypes' names."""
    return tuple(Margin.of(dtype, ratios[dtype]) for dtype in sorted(ratios))

"""The cases of a seed: the suite's own probes, its dyadic cases, and random ones from its own strategy."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from hypothesis import HealthCheck, Phase, given, seed, settings

from conformance.case import Case, DType
from conformance.spec import Kind
from conformance.strategies import cases, dyadic_cases, probes

# One row more than blocks of 16, 32, 64 and 128 hold, as FWD-16 asks.
ROWS = (17, 33, 65, 129)


def batch(kind: Kind, dtype: DType, number: int, random: int) -> list[Case]:
    """The cases of seed `number` for one layer and one dtype, `random` of them random."""
    start = 100 * number
    sharp = list(probes(kind, dtypes=(dtype,), seed=start))
    return [
        *sharp,
        *probes(kind, dtypes=(dtype,), training=False, seed=start + 10),
        *probes(kind, dtypes=(dtype,), adapters=2, seed=start + 20),
        *(
            replace(sharp[0], in_features=8, out_features=5, batch=(rows,), seed=start + 30 + i)
            for i, rows in enumerate(ROWS)
        ),
        *dyadic_cases(kind, dtypes=(dtype,), seed=start + 40),
        *_random(kind, dtype, number, random),
    ]


def nominal(case: Case) -> bool:
    """Whether a case is what other suites draw: normal numbers of order one."""
    return case.values == "gaussian" and case.base_scale == 1.0


def _random(kind: Kind, dtype: DType, number: int, count: int) -> Iterator[Case]:
    """What the suite itself would draw, without looking for anything."""
    if not count:
        return
    found: list[Case] = []

    @seed(number)
    @settings(
        max_examples=count,
        deadline=None,
        database=None,
        phases=(Phase.generate,),
        suppress_health_check=list(HealthCheck),
    )
    @given(cases(kind, dtypes=(dtype,), training=True))
    def collect(case: Case) -> None:
        found.append(case)

    collect()
    yield from dict.fromkeys(found)

"""What a run's ratios say: quantiles by operation, dtype and arithmetic, and the worst of them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from conformance.case import DTYPES, DType
from tests.calibration.drawing import case_of
from tests.calibration.judging import OPERATIONS, RULES, Operation, Rule, implementations

QUANTILES = (0.5, 0.9, 0.99, 0.999, 1.0)
# Those that declare an arithmetic are what its bounds are made for; the others are merely held to it.
DECLARES: dict[Rule, str] = {"strict": "float32", "permissive": "input"}


@dataclass(frozen=True)
class Distribution:
    """Quantiles of the largest error / bound of a run, for one operation under one rule.

    implementation: whose runs; "all" for every one that declares the rule's arithmetic, and
        "nearest" for the largest ratio of each case, whoever reached it.
    """

    operation: Operation
    dtype: DType
    rule: Rule
    implementation: str
    count: int
    median: float
    p90: float
    p99: float
    p999: float
    maximum: float


@dataclass(frozen=True)
class Alarm:
    """A case in which an honest implementation reached a bound: `case` repeats it."""

    implementation: str
    rule: Rule
    operation: Operation
    ratio: float
    case: str


def distributions(ratios: np.ndarray) -> list[Distribution]:
    """All of them, of ratios (cases, implementations, rules, operations)."""
    return list(_distributions(ratios))


def alarms(ratios: np.ndarray, seed: int) -> list[Alarm]:
    """Where the maximum is not below 1."""
    names = list(implementations())
    return [
        Alarm(
            names[i],
            RULES[r],
            OPERATIONS[o],
            float(ratios[n, i, r, o]),
            case_of(seed, int(n)).to_json(),
        )
        for n, i, r, o in np.argwhere(ratios >= 1.0)
    ]


def as_json(found: list[Distribution]) -> list[dict[str, Any]]:
    """The distributions with four significant digits: more of them say nothing."""
    return [
        {k: float(f"{v:.4g}") if isinstance(v, float) else v for k, v in asdict(d).items()}
        for d in found
    ]


def _distributions(ratios: np.ndarray) -> Iterator[Distribution]:
    ports = implementations()
    dtype_of = np.arange(len(ratios)) // 2 % 3  # as `case_of` deals them out
    for o, operation in enumerate(OPERATIONS):
        for d, dtype in enumerate(DTYPES):
            for r, rule in enumerate(RULES):
                table = ratios[dtype_of == d, :, r, o]  # cases, implementations
                if np.isnan(table).all():
                    continue
                own = [i for i, p in enumerate(ports.values()) if p.arithmetic == DECLARES[rule]]
                if dtype == "float32":  # there both arithmetics are one
                    own = list(range(len(ports)))
                judged = table[~np.isnan(table).all(axis=1)]
                groups = {"all": table[:, own], "nearest": np.nanmax(judged, axis=1)}
                groups |= {name: table[:, i] for i, name in enumerate(ports)}
                for name, values in groups.items():
                    values = values[~np.isnan(values)]
                    if values.size:
                        quantiles = map(float, np.quantile(values, QUANTILES))
                        yield Distribution(operation, dtype, rule, name, values.size, *quantiles)

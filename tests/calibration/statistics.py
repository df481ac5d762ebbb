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
class Width:
    """The largest figure of each case for y given the base output, by the width of the layer.

    in_features: the narrowest and the widest of these layers.
    """

    dtype: DType
    rule: Rule
    in_features: tuple[int, int]
    count: int
    median: float
    p90: float


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


def widths(ratios: np.ndarray, seed: int) -> list[Width]:
    """Of the implementations that declare the arithmetic, in octaves of in_features."""
    width = np.array([case_of(seed, n).in_features for n in range(len(ratios))])
    octave = np.floor(np.log2(width)).astype(int)
    found = []
    for dtype, rule, own in _groups():
        y = ratios[:, own, RULES.index(rule), OPERATIONS.index("y")]
        here = (_dtype_of(ratios) == DTYPES.index(dtype)) & ~np.isnan(y).all(axis=1)
        for one in np.unique(octave[here]):
            rows = here & (octave == one)
            worst = np.nanmax(y[rows], axis=1)
            between = int(width[rows].min()), int(width[rows].max())
            median, p90 = map(float, np.quantile(worst, (0.5, 0.9)))
            found.append(Width(dtype, rule, between, len(worst), median, p90))
    return found


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
    for operation in OPERATIONS:
        for dtype, rule, own in _groups():
            of_dtype = ratios[_dtype_of(ratios) == DTYPES.index(dtype)]
            # cases, implementations
            table = of_dtype[:, :, RULES.index(rule), OPERATIONS.index(operation)]
            if np.isnan(table).all():
                continue
            judged = table[~np.isnan(table).all(axis=1)]
            groups = {"all": table[:, own], "nearest": np.nanmax(judged, axis=1)}
            groups |= {name: table[:, i] for i, name in enumerate(ports)}
            for name, values in groups.items():
                values = values[~np.isnan(values)]
                if values.size:
                    quantiles = map(float, np.quantile(values, QUANTILES))
                    yield Distribution(operation, dtype, rule, name, values.size, *quantiles)


def _dtype_of(ratios: np.ndarray) -> np.ndarray:
    """Each case's dtype by its place in DTYPES, as `case_of` deals them out."""
    return np.arange(len(ratios)) // 2 % 3


def _groups() -> Iterator[tuple[DType, Rule, list[int]]]:
    """Each dtype and arithmetic, and the implementations that declare it: all, where both are one."""
    ports = list(implementations().values())
    for dtype in DTYPES:
        for rule in RULES if dtype != "float32" else RULES[:1]:
            declares = [i for i, p in enumerate(ports) if p.arithmetic == DECLARES[rule]]
            yield dtype, rule, list(range(len(ports))) if dtype == "float32" else declares

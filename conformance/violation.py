"""What a port got wrong, said so that its author can act on it without reading the suite."""

from __future__ import annotations

import traceback

import numpy as np

from conformance.case import Case
from conformance.spec import Clause


class Violation(AssertionError):
    """A clause that a port breaks, with the smallest case found."""

    def __init__(
        self, message: str, *, case: Case | None = None, clause: Clause | None = None
    ) -> None:
        super().__init__(message)
        self.message = message
        self.case = case
        self.clause = clause

    @classmethod
    def from_error(cls, error: Exception, case: Case | None) -> Violation:
        """An exception that came out of the port, with the line that raised it."""
        frames = traceback.extract_tb(error.__traceback__)
        where = f" at {short_path(frames[-1].filename)}:{frames[-1].lineno}" if frames else ""
        text = str(error).strip().partition("\n")[0]
        return cls(f"The port raised {type(error).__name__}{where}: {text}", case=case)

    def __str__(self) -> str:
        head = f"{self.clause.id}: " if self.clause else ""
        tail = f"\n  case: {self.case}" if self.case else ""
        return f"{head}{self.message}{tail}"


def describe_elements(
    what: str, got: np.ndarray, expected: np.ndarray, bound: np.ndarray, bad: np.ndarray
) -> str:
    """Name the worst element of those that are off, with what was got, expected and allowed."""
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        error = np.abs(got - expected)
        excess = np.where(bad, np.where(bound > 0, error / bound, np.inf), -1.0)
        # Among equally bad elements (NaN, or a bound of zero) the one that is furthest off.
        rank = np.nan_to_num(excess, nan=np.inf, posinf=np.inf)
        worst = np.flatnonzero((rank == rank.max()).ravel() & bad.ravel())
        furthest = worst[np.argmax(np.nan_to_num(error.ravel()[worst], nan=np.inf))]
    index = np.unravel_index(furthest, got.shape)
    element = f"{what}[{', '.join(str(int(i)) for i in index)}]" if got.ndim else what
    limit = float(bound[index])
    allowed = f"bound {limit:.2e}" if limit > 0 else "which must be exact"
    times = float(error[index]) / limit if limit > 0 else float("nan")
    ratio = f" ({times:.3g} times the bound)" if np.isfinite(times) else ""
    return (
        f"{element} is off by {float(error[index]):.2e}, {allowed}{ratio}: "
        f"got {float(got[index]):.9g}, expected {float(expected[index]):.9g}; "
        f"{int(bad.sum())} of {bad.size} elements are off."
    )


def short_path(filename: str) -> str:
    """The end of a path, from the last site-packages or the last three parts."""
    parts = filename.replace("\\", "/").split("/")
    if "site-packages" in parts:
        return "/".join(parts[parts.index("site-packages") + 1 :])
    return "/".join(parts[-3:])


class NotApplicable(Exception):
    """The clause cannot be asked here: on this device, or without this hardware or package."""


class NotProvided(NotApplicable):
    """The port does not offer what the clause is about, and need not."""

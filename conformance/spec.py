"""The decorator that ties a test to the clause of `SPEC.md` that it decides."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Literal, TypeVar

import pytest

from conformance.clauses import SPEC_PATH, Clause, Level, clauses, spec_version

if TYPE_CHECKING:
    from conformance.trial import Trial

__all__ = [
    "KINDS",
    "SPEC_PATH",
    "Clause",
    "Kind",
    "Level",
    "clause",
    "clause_of",
    "clauses",
    "kinds_of",
    "spec_version",
]

Kind = Literal["4bit", "8bit"]
KINDS: tuple[Kind, ...] = ("4bit", "8bit")
F = TypeVar("F", bound="Callable[[Trial], None]")


def clause(identifier: str, *, kinds: tuple[Kind, ...] = KINDS) -> Callable[[F], F]:
    """Say which clause a test decides, and for which of the two layers it can be asked.

    Raises:
        ValueError: when SPEC.md has no such clause.
    """
    if identifier not in clauses():
        raise ValueError(f"SPEC.md has no clause {identifier}: write its sentence first.")

    def mark(test: F) -> F:
        test.clause_id = identifier  # type: ignore[attr-defined]
        test.kinds = kinds  # type: ignore[attr-defined]
        marked: F = pytest.mark.clause(identifier)(test)
        return marked

    return mark


def clause_of(test: Callable[[Trial], None]) -> Clause:
    """The clause that a test function decides.

    Raises:
        ValueError: when the test carries no `@clause`.
    """
    identifier = getattr(test, "clause_id", None)
    if identifier is None:
        name = getattr(test, "__name__", test)
        raise ValueError(f"`{name}` carries no @clause: say which sentence of SPEC.md it decides.")
    return clauses()[identifier]


def kinds_of(test: Callable[[Trial], None]) -> tuple[Kind, ...]:
    """The layers for which a clause's test can be asked."""
    kinds: tuple[Kind, ...] = getattr(test, "kinds", KINDS)
    return kinds

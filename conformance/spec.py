"""The specification as data: `SPEC.md` read once, and the decorator that ties a test to its clause."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeVar

import pytest

if TYPE_CHECKING:
    from conformance.trial import Trial

Level = Literal["MUST", "SHOULD"]
Kind = Literal["4bit", "8bit"]
KINDS: tuple[Kind, ...] = ("4bit", "8bit")

SPEC_PATH = Path(__file__).with_name("SPEC.md")
_VERSION = re.compile(r"^Specification version (\d+\.\d+)\.", re.MULTILINE)
_CHAPTER = re.compile(r"^## (.+)$")
_ROW = re.compile(r"^\| ([A-Z]+-\d+) \| (MUST|SHOULD) \| (.+?) \| (.+?) \|$")

F = TypeVar("F", bound="Callable[[Trial], None]")


@dataclass(frozen=True)
class Clause:
    """One sentence of SPEC.md that a test decides."""

    id: str
    level: Level
    sentence: str
    source: str
    chapter: str


@cache
def clauses() -> Mapping[str, Clause]:
    """All clauses of SPEC.md by id, in the document's order."""
    found: dict[str, Clause] = {}
    chapter = ""
    for line in SPEC_PATH.read_text(encoding="utf-8").splitlines():
        if heading := _CHAPTER.match(line):
            chapter = heading[1]
        elif row := _ROW.match(line):
            identifier, level, sentence, source = row.groups()
            if identifier in found:
                raise ValueError(f"SPEC.md defines clause {identifier} twice.")
            found[identifier] = Clause(
                identifier, "MUST" if level == "MUST" else "SHOULD", sentence, source, chapter
            )
    return found


@cache
def spec_version() -> str:
    """The version that SPEC.md declares in its head."""
    match = _VERSION.search(SPEC_PATH.read_text(encoding="utf-8"))
    if match is None:
        raise ValueError("SPEC.md does not say `Specification version 1.0.` in its head.")
    return match[1]


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

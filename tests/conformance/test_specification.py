"""SPEC.md, the tests and their chapters stay in step."""

from __future__ import annotations

import importlib
import inspect
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

import conformance
from conformance.spec import clause, clause_of, clauses, spec_version

CHAPTERS: dict[str, str | tuple[str, ...]] = {
    "FWD": "test_forward",
    "GRAD": ("test_gradients", "test_backward"),
    "DROP": "test_dropout",
    "SCALE": "test_scaling",
    "MERGE": "test_merge",
    "INIT": "test_initialisation",
    "ADPT": "test_adapters",
    "DTYPE": "test_dtypes",
    "STATE": "test_state",
    "COMP": "test_compilation",
    "ENV": "test_surroundings",
    "RANK": "test_allocation",
}


def clause_tests() -> list[tuple[str, Callable[..., None]]]:
    """Every test function of the suite, with its module's name."""
    folder = Path(conformance.__file__).parent
    found = []
    for path in sorted(folder.glob("test_*.py")):
        module = importlib.import_module(f"conformance.{path.stem}")
        found += [
            (path.stem, function)
            for name, function in inspect.getmembers(module, inspect.isfunction)
            if name.startswith("test_") and function.__module__ == module.__name__
        ]
    return found


def test_every_clause_has_exactly_one_test() -> None:
    asked = Counter(clause_of(test).id for _, test in clause_tests())
    assert set(asked) == set(clauses())
    assert set(asked.values()) == {1}


def test_a_clause_is_tested_in_its_chapter() -> None:
    for module, test in clause_tests():
        home = CHAPTERS[clause_of(test).id.partition("-")[0]]
        assert module in ((home,) if isinstance(home, str) else home)


def test_clauses_are_numbered_without_gaps() -> None:
    for chapter in CHAPTERS:
        numbers = [int(i.partition("-")[2]) for i in clauses() if i.startswith(f"{chapter}-")]
        assert numbers == list(range(1, len(numbers) + 1))


def test_a_clause_is_one_sentence_with_a_source() -> None:
    for entry in clauses().values():
        assert entry.sentence.endswith(".")
        assert ". " not in entry.sentence.replace("e.g. ", "")
        assert entry.source


def test_there_are_enough_clauses_and_a_version() -> None:
    assert len(clauses()) >= 45
    assert spec_version() == "1.0"


def test_an_unknown_clause_is_refused() -> None:
    with pytest.raises(ValueError, match=r"SPEC.md has no clause FWD-999"):
        clause("FWD-999")


def test_a_test_without_a_clause_is_refused() -> None:
    def test_something(trial: object) -> None: ...

    with pytest.raises(ValueError, match="`test_something` carries no @clause"):
        clause_of(test_something)  # type: ignore[arg-type]

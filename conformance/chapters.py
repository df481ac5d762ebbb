"""Which test decides a clause: the suite's chapters, found by their file names."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from conformance.spec import clause_of

if TYPE_CHECKING:
    from conformance.trial import Trial

Test = Callable[["Trial"], None]


@cache
def tests_by_clause() -> Mapping[str, tuple[Test, ...]]:
    """All the test functions of the chapters, by the clause that they decide."""
    found: dict[str, list[Test]] = {}
    for path in sorted(Path(__file__).parent.glob("test_*.py")):
        module = importlib.import_module(f"{__package__}.{path.stem}")
        for name, value in vars(module).items():
            if name.startswith("test_") and hasattr(value, "clause_id"):
                found.setdefault(clause_of(value).id, []).append(value)
    return {identifier: tuple(tests) for identifier, tests in found.items()}


def test_of(identifier: str) -> Test:
    """The one test that decides a clause."""
    (test,) = tests_by_clause()[identifier]
    return test

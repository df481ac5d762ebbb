"""Power: every planted fault is caught by every clause that is meant for it, and every clause catches one."""

from __future__ import annotations

from collections import Counter

import pytest

from conformance.spec import clauses
from tests.mutants.asking import by_clause, findings
from tests.mutants.gallery import MUTANTS
from tests.mutants.mutant import CORNERS, FAULTS, Mutant, chapter_of


def test_every_clause_has_one_test() -> None:
    assert {c: len(tests) for c, tests in by_clause().items()} == dict.fromkeys(clauses(), 1)


def test_every_clause_is_claimed_by_a_mutant() -> None:
    claimed = {clause for mutant in MUTANTS.values() for clause in mutant.kills}
    assert set(clauses()) == claimed


@pytest.mark.parametrize("mutant", MUTANTS.values(), ids=MUTANTS)
def test_a_mutant_is_killed_by_every_clause_meant_for_it(mutant: Mutant) -> None:
    survived = [c for c in mutant.kills if next(findings(c, mutant.port), None) is None]
    assert survived == []


def test_the_gallery_has_every_kind_of_fault() -> None:
    """A kind with one mutant would be there by name only."""
    kinds = Counter(mutant.kind for mutant in MUTANTS.values())
    assert {kind for kind in FAULTS if kinds[kind] < 5} == set()


def test_the_gallery_has_faults_that_show_in_one_corner_only() -> None:
    assert set(CORNERS) == {mutant.only for mutant in MUTANTS.values()} - {None}


def test_every_chapter_has_faults_of_its_own() -> None:
    homes = Counter(mutant.home for mutant in MUTANTS.values())
    assert {chapter for chapter in map(chapter_of, clauses()) if homes[chapter] < 5} == set()

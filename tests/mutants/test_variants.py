"""False alarms: no clause blames an honest layer, however it is written, whatever the seed.

A seed decides what a clause searches, not its probes: those are asked once, and a clause that does
not search is not asked again.
"""

from __future__ import annotations

from typing import Any

import pytest

from conformance.port import Port
from conformance.spec import clauses
from tests.campaigns.searching import HalfTrial, searches
from tests.mutants.allocator_variants import ALLOCATORS
from tests.mutants.asking import kinds, verdict
from tests.mutants.mutant import chapter_of
from tests.mutants.variants import VARIANTS

# Not 0: that is the seed of every other run.
SEEDS = (1, 2)
RANK = [clause for clause in clauses() if chapter_of(clause) == "RANK"]


def blame(clause: str, **given: Any) -> str:
    """What the clause says under the first seed, or under a later one if it searches at all."""
    for seed in SEEDS if searches(clause, given["kind"]) else SEEDS[:1]:
        trial = HalfTrial(seed=seed, **given)
        trial.half = "both" if seed == SEEDS[0] else "search"
        if found := verdict(clause, trial):
            return found
    return ""


@pytest.mark.parametrize("clause", [clause for clause in clauses() if clause not in RANK])
@pytest.mark.parametrize("name", VARIANTS)
def test_a_variant_passes_every_clause(name: str, clause: str) -> None:
    blamed = [blame(clause, port=VARIANTS[name], kind=kind) for kind in kinds(clause)]
    assert blamed == [""] * len(blamed)


@pytest.mark.parametrize("clause", RANK)
@pytest.mark.parametrize("name", ALLOCATORS)
def test_an_allocator_passes_every_clause(name: str, clause: str) -> None:
    """Over one kind of layer: what an allocator computes does not depend on what is quantised how."""
    assert blame(clause, port=ALLOCATORS[name], kind="4bit") == ""


def test_every_allocator_is_asked() -> None:
    """A port without one passes chapter RANK because nothing is asked of it."""
    assert [n for n, p in ALLOCATORS.items() if p.allocation is None or p.penalty is None] == []
    assert isinstance(ALLOCATORS["qsvd"], Port)

"""False alarms: no clause blames an honest layer, however it is written, whatever the seed.

A seed decides what a clause searches, not its probes: those are asked once, and a clause that does
not search is not asked again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest
from hypothesis.strategies import SearchStrategy

from conformance.case import Case
from conformance.spec import clauses
from conformance.trial import Trial
from tests.mutants.asking import kinds, verdict
from tests.mutants.variants import VARIANTS

# Not 0: that is the seed of every other run.
SEEDS = (1, 2)


class Searching(Trial):
    """A trial that remembers whether the clause searches, and can leave its probes out."""

    searched = False
    probed = False

    def search(
        self,
        cases: SearchStrategy[Case],
        body: Callable[[Case], None],
        probes: Iterable[Case] = (),
        cost: int = 1,
    ) -> None:
        self.searched = True
        super().search(cases, body, () if self.probed else probes, cost)


def blame(clause: str, **given: Any) -> str:
    """What the clause says under the first seed, or under a later one if it searches at all."""
    for seed in SEEDS:
        trial = Searching(seed=seed, **given)
        trial.probed = seed != SEEDS[0]
        if found := verdict(clause, trial):
            return found
        if not trial.searched:
            break
    return ""


@pytest.mark.parametrize("clause", clauses())
@pytest.mark.parametrize("name", VARIANTS)
def test_a_variant_passes_every_clause(name: str, clause: str) -> None:
    blamed = [blame(clause, port=VARIANTS[name], kind=kind) for kind in kinds(clause)]
    assert blamed == [""] * len(blamed)

"""Power: every planted fault is caught by every clause that is meant for it, and every clause catches one."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from conformance.spec import clauses
from tests.mutants.asking import by_clause, findings
from tests.mutants.gallery import MUTANTS
from tests.mutants.mutant import Mutant


@pytest.fixture(autouse=True)
def _global_state() -> Iterator[None]:
    """Some mutants change torch's global state; it ends here."""
    before = torch.get_default_dtype(), torch.get_num_threads(), torch.is_grad_enabled()
    yield
    torch.set_default_dtype(before[0])
    torch.set_num_threads(before[1])
    torch.set_grad_enabled(before[2])
    torch.set_autocast_enabled("cpu", False)


def test_every_clause_has_one_test() -> None:
    assert {c: len(tests) for c, tests in by_clause().items()} == dict.fromkeys(clauses(), 1)


def test_every_clause_is_claimed_by_a_mutant() -> None:
    claimed = {clause for mutant in MUTANTS.values() for clause in mutant.kills}
    assert set(clauses()) == claimed


@pytest.mark.parametrize("mutant", MUTANTS.values(), ids=MUTANTS)
def test_a_mutant_is_killed_by_every_clause_meant_for_it(mutant: Mutant) -> None:
    survived = [c for c in mutant.kills if next(findings(c, mutant.port), None) is None]
    assert survived == []

"""False alarms: no clause blames an honest layer, however it is written.

One seed here; `python -m tests.false_alarms` asks the same of hundreds.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import pytest

from conformance.case import Case
from conformance.port import Port
from conformance.spec import Kind, clauses
from tests.campaigns.searching import Half, SharingTrial, searches
from tests.mutants.allocator_variants import ALLOCATORS
from tests.mutants.asking import kinds, verdict
from tests.mutants.gallery import MUTANTS
from tests.mutants.mutant import chapter_of
from tests.mutants.variants import VARIANTS

# Not 0: that is the seed of every other run.
SEED = 1
# A variant computes its update otherwise, and is otherwise the honest layer: what is not about numbers
# is asked of three, and what is about them of these over both base layers, of every other variant over
# one. The campaign asks all of all.
NUMERICAL = ("FWD", "GRAD", "DTYPE", "DROP", "SCALE")
THREE = ("the honest layer", "compiled by torch", "qsvd")
RANK = [clause for clause in clauses() if chapter_of(clause) == "RANK"]


def asked(clause: str, kind: Kind) -> Mapping[str, Port]:
    """The variants that a clause is asked of, over one kind of base layer."""
    if chapter_of(clause) not in NUMERICAL:
        return {name: VARIANTS[name] for name in THREE}
    own = kinds(clause)
    shares = enumerate(VARIANTS.items())
    return {n: p for i, (n, p) in shares if n in THREE or own[i % len(own)] == kind}


def alarms(clause: str, kind: Kind, ports: Mapping[str, Port]) -> Iterator[str]:
    """What the clause says of each port that it blames; all are asked of the cases of one search."""
    cases: list[Case] = []
    halves: tuple[Half, ...] = ("probes", "search") if searches(clause, kind) else ("both",)
    for name, port in ports.items():
        for half in halves:
            trial = SharingTrial(port=port, kind=kind, seed=SEED, cases=cases)
            trial.half = half
            if said := verdict(clause, trial):
                yield f"{name}, {kind}: {said}"


@pytest.mark.parametrize("clause", [clause for clause in clauses() if clause not in RANK])
def test_no_variant_is_blamed(clause: str) -> None:
    found = [said for kind in kinds(clause) for said in alarms(clause, kind, asked(clause, kind))]
    assert found == []


@pytest.mark.parametrize("clause", RANK)
def test_no_allocator_is_blamed(clause: str) -> None:
    """Over one kind of layer: what an allocator computes does not depend on what is quantised how."""
    assert list(alarms(clause, "4bit", ALLOCATORS)) == []


def test_every_variant_is_asked_everything_about_numbers() -> None:
    numerical = [clause for clause in clauses() if chapter_of(clause) in NUMERICAL]
    for clause in numerical:
        assert {name for kind in kinds(clause) for name in asked(clause, kind)} == set(VARIANTS)


def test_a_faulty_port_among_them_is_blamed() -> None:
    port = MUTANTS["subtracts the update"].port
    found = list(alarms("FWD-1", "4bit", {**VARIANTS, "faulty": port}))
    assert found
    assert all(said.startswith("faulty, 4bit") for said in found)


def test_every_allocator_is_asked() -> None:
    """A port without one passes chapter RANK because nothing is asked of it."""
    assert [n for n, p in ALLOCATORS.items() if p.allocation is None or p.penalty is None] == []
    assert isinstance(ALLOCATORS["qsvd"], Port)

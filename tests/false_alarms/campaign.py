"""Asking honest layers everything under many seeds, and what the suite has against them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from conformance.case import Case
from conformance.profile import PROFILES, Profile
from conformance.spec import Kind, clauses
from conformance.trial import NotApplicable, run_clause
from conformance.violation import Violation
from tests.campaigns.searching import SharingTrial, searches
from tests.mutants.allocator_variants import ALLOCATORS
from tests.mutants.asking import by_clause, kinds, unchanged_torch
from tests.mutants.mutant import chapter_of
from tests.mutants.variants import VARIANTS

# Under this seed everything is asked. A later one decides only what is searched: probes, and the
# clauses that do not search, would be asked the same again.
FIRST_SEED = 0
# Some are layers, some allocators over the honest layer, and qsvd is both.
HONEST = {**VARIANTS, **{f"allocator: {name}": port for name, port in ALLOCATORS.items()}}


@dataclass(frozen=True)
class Unit:
    """One profile and seed, for all the variants that have not had it: they share its cases."""

    profile: str
    seed: int
    variants: tuple[str, ...]
    clauses: tuple[str, ...]


@dataclass
class Finding:
    """What one variant got under one profile and seed."""

    variant: str
    profile: str
    seed: int
    asked: int = 0  # clauses, each of each of its layers
    examples: int = 0
    compared: int = 0  # elements and facts
    worst_ratio: float = 0.0
    alarms: list[dict[str, str]] = field(default_factory=list)

    def as_entry(self) -> dict[str, Any]:
        return asdict(self)


def units(
    profile: str, seeds: Sequence[int], variants: Sequence[str], done: set[tuple[str, str, int]]
) -> Iterator[Unit]:
    """What is left to do, in the order in which it is done: seeds outermost, then variants."""
    for seed in seeds:
        left = tuple(v for v in variants if (v, profile, seed) not in done)
        if left:
            yield Unit(profile, seed, left, tuple(clauses()))


def ask_unit(unit: Unit) -> list[Finding]:
    """Ask every variant of the unit every clause that the seed has a say in."""
    found = {name: Finding(name, unit.profile, unit.seed) for name in unit.variants}
    profile = PROFILES[unit.profile]
    for clause in unit.clauses:
        for kind in kinds(clause):
            if unit.seed == FIRST_SEED or searches(clause, kind):
                shared: list[Case] = []
                for finding in found.values():
                    if concerns(finding.variant, clause):
                        _ask(finding, clause, kind, profile, shared)
    return list(found.values())


def concerns(variant: str, clause: str) -> bool:
    """Layers are asked the chapters on layers, allocators the one on allocators."""
    return (variant in VARIANTS) == (chapter_of(clause) != "RANK")


def _ask(finding: Finding, clause: str, kind: Kind, profile: Profile, shared: list[Case]) -> None:
    trial = SharingTrial(
        port=HONEST[finding.variant], kind=kind, profile=profile, seed=finding.seed, cases=shared
    )
    trial.half = "both" if finding.seed == FIRST_SEED else "search"
    (test,) = by_clause()[clause]
    finding.asked += 1
    try:
        with unchanged_torch():
            run_clause(test, trial)
    except NotApplicable:
        finding.asked -= 1
    except Violation as violation:
        finding.alarms.append(
            {
                "clause": clause,
                "kind": kind,
                "message": str(violation),
                "case": violation.case.to_json() if violation.case else "",
            }
        )
    finding.examples += trial.examples
    finding.compared += trial.compared
    finding.worst_ratio = max(finding.worst_ratio, trial.worst_ratio)


def reproducer(finding: Finding, alarm: dict[str, str]) -> str:
    """The command that shows an alarm again."""
    return (
        f"python -m tests.false_alarms --variant={finding.variant!r} --profile={finding.profile} "
        f"--seed={finding.seed} --clause={alarm['clause']}"
    )

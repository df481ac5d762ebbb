"""The whole clause set on the same mutants: what no rule for a tensor can be compared with otherwise."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from conformance.spec import clauses
from tests.field.measure import honest_ports
from tests.field.play import untouched
from tests.mutants.asking import ask, kinds
from tests.mutants.gallery import MUTANTS

# The chapters about numbers; the others ask about attributes, refusals and state.
CHAPTERS = ("FWD", "GRAD", "SCALE", "DTYPE")


@dataclass(frozen=True)
class Asked:
    """What the clauses said, in the quick profile.

    killed: seeds under which a mutant breaks a clause that claims it, by mutant.
    alarms: the clauses that an honest layer breaks, by layer; `questions` is how many were asked.
    """

    killed: dict[str, list[int]]
    alarms: dict[str, list[str]]
    questions: int

    def sure(self, seeds: int) -> list[str]:
        return [name for name, under in self.killed.items() if len(under) == seeds]


def kills(name: str, seed: int) -> bool:
    """Whether some clause that claims the mutant fails it under this seed."""
    mutant = MUTANTS[name]
    with untouched():
        return any(
            ask(clause, mutant.port, kind, seed)
            for clause in mutant.kills
            for kind in kinds(clause)
        )


def blames(name: str, seed: int) -> tuple[list[str], int]:
    """The clauses about numbers that the suite blames an honest variant for, and how many it asked."""
    port, asked, blamed = honest_ports()[name], 0, []
    for clause in clauses():
        if clause.partition("-")[0] not in CHAPTERS:
            continue
        for kind in kinds(clause):
            asked += 1
            if ask(clause, port, kind, seed):
                blamed.append(clause)
    return blamed, asked


def variants() -> Sequence[str]:
    """The honest layers that the clauses are asked of: PEFT breaks some, and says so elsewhere."""
    return [name for name in honest_ports() if name != "PEFT"]

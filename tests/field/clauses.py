"""The whole clause set on the same mutants: what no rule for a tensor can be compared with otherwise."""

from __future__ import annotations

from dataclasses import dataclass

from tests.mutants.asking import ask, kinds
from tests.mutants.gallery import MUTANTS


@dataclass(frozen=True)
class Asked:
    """Seeds under which a mutant breaks a clause that claims it, in the quick profile, by mutant.

    Honest variants are asked of every clause by `tests/mutants/test_variants.py`, and must pass.
    """

    killed: dict[str, list[int]]

    def sure(self, seeds: int) -> list[str]:
        return [name for name, under in self.killed.items() if len(under) == seeds]


def kills(name: str, seed: int) -> bool:
    """Whether some clause that claims the mutant fails it under this seed."""
    mutant = MUTANTS[name]
    return any(
        ask(clause, mutant.port, kind, seed) for clause in mutant.kills for kind in kinds(clause)
    )

"""Probes and searches apart: a seed decides what a clause searches, and nothing else."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cache
from typing import Literal

from hypothesis.strategies import SearchStrategy

from conformance.case import Case
from conformance.port import Port
from conformance.spec import Kind
from conformance.trial import NotApplicable, Trial
from tests.mutants.asking import by_clause

Half = Literal["both", "probes", "search"]


@dataclass
class HalfTrial(Trial):
    """A trial that can leave a search's probes out, or the search itself."""

    half: Half = "both"

    def search(
        self,
        cases: SearchStrategy[Case],
        body: Callable[[Case], None],
        probes: Iterable[Case] = (),
        cost: int = 1,
    ) -> None:
        if self.half == "probes":
            self.check(body, probes)
        else:
            super().search(cases, body, () if self.half == "search" else probes, cost)


@dataclass
class SharingTrial(HalfTrial):
    """A trial that searches once for all variants: a seed gives each of them the same cases.

    What hypothesis draws depends on the seed and on the strategy; no passing body changes it. So the
    first variant's cases are kept, unless something failed and was shrunk, and the others are
    asked of those: the search costs as much as asking does.
    """

    cases: list[Case] = field(default_factory=list)

    def search(
        self,
        cases: SearchStrategy[Case],
        body: Callable[[Case], None],
        probes: Iterable[Case] = (),
        cost: int = 1,
    ) -> None:
        if self.cases and self.half == "search":
            self.check(body, list(self.cases))
            return
        drawn: list[Case] = []

        def noted(case: Case) -> None:
            drawn.append(case)
            body(case)

        super().search(cases, noted, probes, cost)
        if self.half == "search":
            self.cases.extend(drawn)


class _Looking(Trial):
    """A trial that only finds out whether the clause searches."""

    def search(self, *_: object, **__: object) -> None:
        raise _Searches

    def check(self, *_: object, **__: object) -> None:
        raise NotApplicable("nothing is asked here")


class _Searches(Exception):
    """The clause searches."""


@cache
def searches(clause: str, kind: Kind) -> bool:
    """Whether a clause looks for cases of one kind, beyond listed ones."""
    (test,) = by_clause()[clause]
    try:
        test(_Looking(port=Port("nobody", "0", {}), kind=kind))
    except _Searches:
        return True
    except Exception:  # it asks something of the port before it lists cases: it does not search
        return False
    return False

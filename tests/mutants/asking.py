"""Asking clauses in this process: which test decides a clause, and what it says of a port."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from pathlib import Path

import torch

import conformance
from conformance.port import Port
from conformance.profile import QUICK, Profile
from conformance.spec import KINDS, Kind, clause_of, kinds_of
from conformance.trial import NotApplicable, Trial, run_clause
from conformance.violation import Violation

Test = Callable[[Trial], None]
# The quick profile leaves out real weights; two clauses are about nothing else.
REAL = replace(QUICK, real_model=True)
ON_REAL_WEIGHTS = ("FWD-23", "GRAD-19")


@cache
def by_clause() -> dict[str, list[Test]]:
    """All the test functions of the conformance suite, by the clause that they decide."""
    found: dict[str, list[Test]] = {}
    for path in sorted(Path(conformance.__file__).parent.glob("test_*.py")):
        module = importlib.import_module(f"conformance.{path.stem}")
        for name, value in vars(module).items():
            if name.startswith("test_") and hasattr(value, "clause_id"):
                found.setdefault(clause_of(value).id, []).append(value)
    return found


def profile_for(clause: str) -> Profile:
    return REAL if clause in ON_REAL_WEIGHTS else QUICK


def ask(clause: str, port: Port, kind: Kind, seed: int = 0, profile: Profile | None = None) -> str:
    """What the clause has against the port: nothing, or the violation's text."""
    trial = Trial(port=port, kind=kind, profile=profile or profile_for(clause), seed=seed)
    return verdict(clause, trial)


def verdict(clause: str, trial: Trial) -> str:
    """What the clause has against the trial's port: nothing, or the violation's text."""
    (test,) = by_clause()[clause]
    try:
        with unchanged_torch():
            run_clause(test, trial)
    except NotApplicable:
        return ""
    except Violation as violation:
        return str(violation)
    return ""


@contextmanager
def unchanged_torch() -> Iterator[None]:
    """Some mutants change torch's global state; it ends here."""
    before = torch.get_default_dtype(), torch.get_num_threads(), torch.is_grad_enabled()
    try:
        yield
    finally:
        torch.set_default_dtype(before[0])
        torch.set_num_threads(before[1])
        torch.set_grad_enabled(before[2])
        torch.set_autocast_enabled("cpu", False)


def kinds(clause: str) -> tuple[Kind, ...]:
    (test,) = by_clause()[clause]
    return tuple(k for k in KINDS if k in kinds_of(test))


def findings(clause: str, port: Port) -> Iterator[str]:
    """What the clause has against each of the port's layers, the empty findings left out."""
    for kind in kinds(clause):
        if found := ask(clause, port, kind):
            yield f"{kind}: {found}"

"""The study: batches, then clauses, then the count. What `python -m tests.field` runs."""

from __future__ import annotations

import hashlib
from dataclasses import asdict
from itertools import product
from pathlib import Path
from typing import Any

from conformance.case import DType
from conformance.spec import Kind
from tests.field import clauses as clause_set
from tests.field.campaign import Plan, Store, Task, digest, run, settings
from tests.field.clauses import Asked
from tests.field.measure import Batch, run_batch
from tests.field.results import Results, count


def study(plan: Plan, cache: Path, jobs: int = 1) -> Results:
    """Measure what the plan says, or take up a measurement that was interrupted."""
    store = Store(cache / digest(plan))
    batches = _batches(plan, store, jobs)
    found = count(batches)
    visible = sorted({name for f in found.values() for name in f.visible})
    asked = _clauses(visible, plan, store, jobs) if plan.clauses else Asked({})
    return Results(settings(plan), found, asked)


def _batches(plan: Plan, store: Store, jobs: int) -> list[Batch]:
    """The first seed plays all mutants; later ones those that differed from the eager layer in it."""
    pairs = list(product(plan.kinds, plan.dtypes))
    first = run(
        [_task(kind, dtype, 0, plan, plan.mutants) for kind, dtype in pairs],
        store,
        jobs,
        "first seed",
    )
    screened = [Batch.from_json(given) for given in first.values()]
    later = run(
        [
            _task(b.kind, b.dtype, seed, plan, tuple(n for n, t in b.mutants.items() if t.differs))
            for seed in range(1, plan.seeds)
            for b in screened
        ],
        store,
        jobs,
        "later seeds",
    )
    return screened + [Batch.from_json(given) for given in later.values()]


def _task(kind: Kind, dtype: DType, seed: int, plan: Plan, mutants: tuple[str, ...] | None) -> Task:
    return f"{kind}-{dtype}-{seed}", batch_json, (kind, dtype, seed, plan.random, mutants)


def batch_json(
    kind: Kind, dtype: DType, seed: int, random: int, mutants: tuple[str, ...] | None
) -> dict[str, Any]:
    """`run_batch`, in the form that processes and files exchange."""
    return asdict(run_batch(kind, dtype, seed, random, mutants))


def _clauses(visible: list[str], plan: Plan, store: Store, jobs: int) -> Asked:
    # More seeds may make more mutants visible: what was asked of fewer is not the answer.
    asked = hashlib.sha256("\n".join(visible).encode()).hexdigest()[:8]
    killed = run(
        [(f"clauses-{seed}-{asked}", kills_under, (visible, seed)) for seed in range(plan.seeds)],
        store,
        jobs,
        "clauses",
    )
    return Asked(
        killed={
            name: [seed for seed, found in enumerate(killed.values()) if name in found]
            for name in visible
        },
    )


def kills_under(names: list[str], seed: int) -> list[str]:
    """The mutants that some clause claiming them fails under this seed."""
    return [name for name in names if clause_set.kills(name, seed)]

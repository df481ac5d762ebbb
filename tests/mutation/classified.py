"""survivors.toml: why each mutant that the suite lets live may live, held to what the judge found.

[[survivors]]
file = "_products.py"
function = "_split_product"
changes = ["pieces = ... → pieces = ..."]    # or "all", where no clause reaches the function
kind = "elsewhere"
because = "runs on CUDA alone"

[[closed]]                                    # a survivor of earlier days, and what kills it now
mutant = "_adapters.py: Adapters.set_adapter: ... → ..."
clause = "ADPT-6"
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.mutation.mutants import Mutant

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

PATH = Path(__file__).with_name("survivors.toml")
KINDS = {
    "equivalent": "Equivalent: no user can see a difference",
    "elsewhere": "Not run on this machine: CUDA, another CPU, another release",
    "performance": "Performance or memory only",
    "message": "Wording of a message",
    "own": "A promise of qsvd's alone, no port's duty: held by tests/qsvd",
    "open": "A gap that is not closed yet",
}


class ClassificationError(Exception):
    """survivors.toml is not in step with the mutants: the message names every entry that is not."""


@dataclass(frozen=True)
class Reason:
    """What kind of survivor a mutant is, and why."""

    kind: str
    because: str


@dataclass(frozen=True)
class Closed:
    """A mutant that survived once, and the clause whose test or probe was made to kill it."""

    mutant: str
    clause: str


@dataclass(frozen=True)
class Classified:
    reasons: Mapping[str, Reason]
    closed: Sequence[Closed]


@dataclass(frozen=True)
class Judged:
    """A mutant, and who noticed it: a clause, a test of qsvd's own, or nobody."""

    mutant: Mutant
    clause: str
    test: str
    asked: int


def load(judged: Sequence[Judged], complete: bool, path: Path = PATH) -> Classified:
    """The reasons of the judged survivors.

    Args:
        judged: what the judge has said so far.
        complete: whether that is all mutants; only then is an entry about none of them an error.

    Raises:
        ClassificationError: for a survivor without a reason, a reason for a mutant that dies or is not
            there, a "held by tests/qsvd" that no test holds, and an entry that is malformed.
    """
    content = tomllib.loads(path.read_text(encoding="utf-8"))
    reasons: dict[str, Reason] = {}
    wrong: list[str] = []
    for entry in content.get("survivors", []):
        wrong += _enter(entry, judged, complete, reasons)
    by_name = {j.mutant.name: j for j in judged}
    for name, reason in reasons.items():
        if reason.kind == "own" and name in by_name and not by_name[name].test:
            wrong.append(f"no test of tests/qsvd fails on this mutant: {name}")
    wrong += [
        f"survives, and has no reason: {j.mutant.name}"
        for j in judged
        if not j.clause and j.mutant.name not in reasons
    ]
    closed = [Closed(**entry) for entry in content.get("closed", [])]
    for one in closed:
        if one.mutant in by_name and not by_name[one.mutant].clause:
            wrong.append(f"said to be closed by {one.clause}, and survives: {one.mutant}")
        elif one.mutant not in by_name and complete:
            wrong.append(f"said to be closed, and is no mutant: {one.mutant}")
    if wrong:
        raise ClassificationError(f"{path}:\n  " + "\n  ".join(wrong))
    return Classified(reasons, closed)


def _enter(
    entry: dict[str, Any], judged: Sequence[Judged], complete: bool, into: dict[str, Reason]
) -> list[str]:
    """Put an entry's reasons in; returns what is wrong with it."""
    if set(entry) != {"file", "function", "changes", "kind", "because"}:
        return [f"an entry has the keys {sorted(entry)}"]
    where = f"{entry['file']}: {entry['function']}"
    if entry["kind"] not in KINDS or not entry["because"]:
        return [f"{where}: `kind` must be one of {sorted(KINDS)}, and `because` not empty"]
    reason = Reason(entry["kind"], entry["because"])
    here = [j for j in judged if f"{j.mutant.file}: {j.mutant.function}" == where]
    if entry["changes"] == "all":
        living = [j for j in here if not j.clause]
        if any(j.asked for j in living):
            return [f"{where}: `all` is for functions that no clause reaches"]
        into.update({j.mutant.name: reason for j in living if j.mutant.name not in into})
        return [] if living or not complete else [f"{where}: no mutant survives there"]
    by_change = {j.mutant.change: j for j in here}
    wrong = []
    for change in entry["changes"]:
        found = by_change.get(change)
        if found is None and complete:
            wrong.append(f"no such mutant: {where}: {change}")
        elif found is not None and found.clause:
            wrong.append(f"has a reason to live, and dies of {found.clause}: {where}: {change}")
        into[f"{where}: {change}"] = reason
    return wrong

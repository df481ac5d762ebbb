"""The judge: asks one clause of one layer in this process, and puts what came of it into an answer."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal

from conformance.chapters import Test
from conformance.trial import NotApplicable, Trial, run_clause
from conformance.verdict import Outcome
from conformance.violation import NotProvided, Violation


@dataclass(frozen=True)
class Answer:
    """What became of one clause: everything in it but `error` can be written as JSON.

    `case` is the JSON of the case that failed; `measured` holds the trial's counts, by the names of
    the fields of `Outcome`; `error` is what was raised, for a debugger in this process.
    """

    status: Literal["pass", "fail", "skip", "not-provided"]
    message: str = ""
    case: str | None = None
    measured: Mapping[str, Any] = field(default_factory=dict)
    error: Exception | None = field(default=None, compare=False, repr=False)

    def as_json(self) -> dict[str, Any]:
        return {
            "status": self.status,
            "message": self.message,
            "case": self.case,
            "measured": dict(self.measured),
        }


NOT_PROVIDED = Answer("not-provided", "not provided")


def judge(test: Test, trial: Trial) -> Answer:
    """Ask a clause of the trial's port."""
    if not trial.port.provides(trial.kind):
        return NOT_PROVIDED
    try:
        run_clause(test, trial)
    except NotProvided as reason:
        return Answer("not-provided", str(reason))
    except NotApplicable as reason:
        return Answer("skip", str(reason), measured=measured(trial))
    except Violation as violation:
        return Answer(
            "fail",
            str(violation),
            violation.case.to_json() if violation.case else None,
            measured(trial),
            violation,
        )
    return Answer("pass", measured=measured(trial))


def measured(trial: Trial) -> dict[str, Any]:
    """What the trial counted, as plain data: every field of `Outcome` that a trial has, too."""
    names = {f.name for f in fields(Outcome)} - {"port", "kind"}
    counted = {name: getattr(trial, name) for name in sorted(names) if hasattr(trial, name)}
    plain: dict[str, Any] = json.loads(json.dumps(counted, default=asdict))
    return plain

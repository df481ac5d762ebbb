"""Outcomes made up for the tests of reports: what a run of hours, or of five bad ports, would find."""

from __future__ import annotations

from typing import Any

from conformance.clauses import clauses
from conformance.margin import Margin
from conformance.verdict import Outcome, PortVerdict

SUITE: dict[str, Any] = {
    "version": "0.1.0",
    "spec_version": "1.0",
    "seed": 3,
    "profile": "quick",
    "max_examples": 8,
    "device": "cpu",
    "versions": {"python": "3.12", "platform": "Linux", "torch": "2.13.0", "bitsandbytes": "0.50"},
    "narrowed_by": [],
    "stale_xfails": [],
    "time": {"started": "2026-01-02T03:04:05Z", "seconds": 61.5},
}
CASE = '{"kind":"4bit","batch":[2],"ranks":[3]}'
LONG_NAME = "a_company.with_a_long_name.and_a_deep_tree.of_modules.adalora"[:60]


def outcome(clause: str, status: str, kind: str = "4bit", **more: Any) -> Outcome:
    return Outcome("mine", clause, kind, status, **more)  # type: ignore[arg-type]


def failing(clause: str, kind: str, message: str = "", port: str = "mine") -> Outcome:
    """A failure with all that a failure has."""
    said = message or "y[0, 2] is off by 7.08e-01, bound 2.20e-06: got 0.35, expected 1.06."
    return Outcome(
        port,
        clause,
        kind,  # type: ignore[arg-type]
        "fail",
        examples=3,
        compared=1200,
        worst_ratio=321289.46,
        message=f"{kind}: {clause}: {said}\n  case: {kind} nf4 float32 in=4 out=3 seed=0",
        reproduce=f"pytest conformance --port={port} --clause={clause} '--case={CASE}'",
        margins=(
            Margin.of("bfloat16", [0.1, 0.31, 0.33, 0.9]),
            Margin.of("float32", [0.02, 0.03, 321289.46]),
        ),
    )


def port(*outcomes: Outcome, name: str = "mine") -> PortVerdict:
    return PortVerdict(name, "1.0", list(outcomes))


def all_failing(name: str) -> PortVerdict:
    """A port that gets every clause of SPEC.md wrong, under both layers."""
    return port(
        *(failing(c, kind, port=name) for c in clauses() for kind in ("4bit", "8bit")), name=name
    )

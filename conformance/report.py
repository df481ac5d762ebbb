"""Reports: the verdict as JSON (schemas/report.schema.json says its form) and as one HTML page."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from conformance.margin import Margin
from conformance.page import as_html
from conformance.verdict import ClauseVerdict, Outcome, PortVerdict

REPORT_VERSION = "1.0"
SCHEMA_PATH = Path(__file__).parent / "schemas" / "report.schema.json"


def as_json(ports: Sequence[PortVerdict], suite: Mapping[str, Any]) -> dict[str, Any]:
    """The suite's settings, then every port's clauses, each with what its layers said."""
    return {
        "suite": {"report_version": REPORT_VERSION, **suite},
        "ports": [
            {
                "name": port.name,
                "version": port.version,
                "clauses": [_clause(c) for c in port.clauses],
                "passed": port.passed,
            }
            for port in ports
        ],
    }


def write_report(path: Path, ports: Sequence[PortVerdict], suite: Mapping[str, Any]) -> None:
    """Write the verdict in the format that the path's suffix names; a reader never sees half of it."""
    text = FORMATS[path.suffix](ports, suite)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        part.write_text(text, encoding="utf-8")
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def _as_text(ports: Sequence[PortVerdict], suite: Mapping[str, Any]) -> str:
    return json.dumps(as_json(ports, suite), indent=2, allow_nan=False) + "\n"


FORMATS: Mapping[str, Callable[[Sequence[PortVerdict], Mapping[str, Any]], str]] = {
    ".json": _as_text,
    ".html": as_html,
}


def _clause(verdict: ClauseVerdict) -> dict[str, Any]:
    shown = verdict.failures or verdict.outcomes
    return {
        "id": verdict.clause.id,
        "level": verdict.clause.level,
        "status": verdict.status,
        "examples": sum(o.examples for o in verdict.outcomes),
        "worst_ratio": _finite(verdict.worst_ratio),
        "message": "\n".join(dict.fromkeys(o.message for o in shown if o.message)),
        "reproduce": next((o.reproduce for o in shown if o.reproduce), ""),
        "layers": {o.kind: o.status for o in verdict.outcomes},
        "details": {o.kind: _details(o) for o in verdict.outcomes},
    }


def _details(outcome: Outcome) -> dict[str, Any]:
    return {
        "status": outcome.status,
        "examples": outcome.examples,
        "compared": outcome.compared,
        "worst_ratio": _finite(outcome.worst_ratio),
        "message": outcome.message,
        "reproduce": outcome.reproduce,
        "margins": [_margin(m) for m in outcome.margins],
    }


def _margin(margin: Margin) -> dict[str, Any]:
    return {
        "dtype": margin.dtype,
        "count": margin.count,
        "median": _finite(margin.median),
        "worst": _finite(margin.worst),
        "bins": list(margin.bins),
    }


def _finite(ratio: float) -> float | None:
    """JSON has no infinity: null stands for an error where none is allowed."""
    return ratio if math.isfinite(ratio) else None

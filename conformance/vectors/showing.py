"""The verdict on a port's outputs: a table for a terminal, and JSON for machines."""

from __future__ import annotations

import io
import math
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from conformance import __version__
from conformance.clauses import spec_version
from conformance.vectors.checking import Status, Verdict
from conformance.vectors.index import Index
from conformance.vectors.loading import Outputs

__all__ = ["as_json", "render"]

SHOWN_FAILURES = 3
SHOWN_UNKNOWN = 20
BESIDE_THE_SENTENCE = 8 + 6 + 7 + 10 + 16  # the other columns, and the borders
NARROWEST = BESIDE_THE_SENTENCE + 24
_WORD: dict[Status, str] = {"pass": "[green]pass[/]", "fail": "[bold red]FAIL[/]"}


def render(verdict: Verdict, *, width: int, colour: bool, verbose: bool = False) -> str:
    """Clauses, then vectors by kind and dtype (each of them if `verbose`), failures, and the verdict."""
    out = io.StringIO()
    console = Console(file=out, force_terminal=colour, no_color=not colour, highlight=False)
    console.width = max(width, NARROWEST)
    console.print(_clause_table(verdict, console.width))
    console.print(_vector_table(verdict) if verbose else _kind_table(verdict))
    _print_failures(console, verdict)
    console.print(_summary(verdict), soft_wrap=True)
    return out.getvalue()


def _clause_table(verdict: Verdict, width: int) -> Table:
    table = Table(title="Clauses, and worst error / bound", title_justify="left")
    table.add_column("clause", no_wrap=True, width=8)
    table.add_column("level", no_wrap=True, width=6)
    table.add_column(
        "sentence", no_wrap=True, overflow="ellipsis", width=width - BESIDE_THE_SENTENCE
    )
    table.add_column("outputs", justify="right", no_wrap=True, width=7)
    table.add_column("status", no_wrap=True, width=10)
    for entry in verdict.clauses:
        clause = entry.clause
        status = _WORD[entry.status] + _ratio(entry.worst_ratio)
        table.add_row(
            clause.id, clause.level, escape(clause.sentence), str(len(entry.findings)), status
        )
    return table


def _kind_table(verdict: Verdict) -> Table:
    table = Table(title="Vectors", title_justify="left")
    for heading in ("kind", "dtype"):
        table.add_column(heading, no_wrap=True)
    for heading in ("vectors", "failed"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("status", no_wrap=True)
    groups: dict[tuple[str, str], list[tuple[Status, float]]] = {}
    for entry in verdict.vectors:
        key = (entry.vector.kind, entry.vector.dtype or "")
        groups.setdefault(key, []).append((entry.status, entry.worst_ratio))
    for (kind, dtype), found in groups.items():
        failed = sum(status == "fail" for status, _ in found)
        status = _WORD["fail" if failed else "pass"] + _ratio(max(r for _, r in found))
        table.add_row(kind, dtype, str(len(found)), str(failed), status)
    return table


def _vector_table(verdict: Verdict) -> Table:
    table = Table(title="Vectors", title_justify="left")
    table.add_column("vector", no_wrap=True)
    table.add_column("why", no_wrap=True, overflow="ellipsis", min_width=24)
    table.add_column("status", no_wrap=True)
    for entry in verdict.vectors:
        status = _WORD[entry.status] + _ratio(entry.worst_ratio)
        table.add_row(escape(entry.vector.id), escape(entry.vector.reason), status)
    return table


def _ratio(ratio: float) -> str:
    if ratio == 0:
        return ""
    if not math.isfinite(ratio):
        return " ∞"
    return f" {ratio:.2f}" if ratio < 100 else f" {ratio:.0e}"


def _print_failures(console: Console, verdict: Verdict) -> None:
    """Each broken clause with the first of its failures: one output may break several clauses."""
    for entry in verdict.clauses:
        if not entry.broken:
            continue
        clause, messages = entry.clause, [m for f in entry.broken for m in f.messages]
        console.print(
            f"[bold red]{clause.id}[/] {clause.level}: {escape(clause.sentence)}", soft_wrap=True
        )
        for message in messages[:SHOWN_FAILURES]:
            console.print(f"  {escape(message)}", soft_wrap=True)
        if len(messages) > SHOWN_FAILURES:
            more = len(messages) - SHOWN_FAILURES
            console.print(f"  ... and {more} more; --json PATH writes them all.", soft_wrap=True)
    for key, file in verdict.unknown[:SHOWN_UNKNOWN]:
        console.print(
            f"[bold red]unknown[/]: {escape(f'{file}: no vector has key {key!r}.')}", soft_wrap=True
        )


def _summary(verdict: Verdict) -> str:
    asked, total = len(verdict.vectors), verdict.total
    failed = sum(v.status == "fail" for v in verdict.vectors)
    if not asked:
        return "[bold red]Nothing was asked[/]: no vector has that kind and dtype."
    scope = f"all {total} vectors" if asked == total else f"the {asked} of {total} vectors asked"
    if verdict.passed:
        return f"[bold green]The outputs conform[/] on {scope}."
    extra = f", {len(verdict.unknown)} unknown keys" if verdict.unknown else ""
    return f"[bold red]The outputs do not conform[/]: {failed} of {scope} fail{extra}."


def as_json(verdict: Verdict, index: Index, outputs: Outputs) -> dict[str, Any]:
    """The verdict in the form that vectors-verdict.schema.json publishes."""
    return {
        "suite": {
            "version": __version__,
            "spec_version": spec_version(),
            "seed": index.seed,
            "digest": index.digest,
            "arithmetic": verdict.claim,
            "asked": len(verdict.vectors),
            "vectors": verdict.total,
        },
        "outputs": dict(sorted(outputs.hashes.items())),
        "clauses": [
            {
                "id": entry.clause.id,
                "level": entry.clause.level,
                "status": entry.status,
                "outputs": len(entry.findings),
                "worst_ratio": _finite(entry.worst_ratio),
                "failed": [f.output.key for f in entry.broken],
            }
            for entry in verdict.clauses
        ],
        "vectors": [
            {
                "id": entry.vector.id,
                "reason": entry.vector.reason,
                "status": entry.status,
                "worst_ratio": _finite(entry.worst_ratio),
                "broken": sorted({c for f in entry.findings for c in f.broken}),
                "messages": [m for f in entry.findings for m in f.messages],
            }
            for entry in verdict.vectors
        ],
        "unknown": [{"key": key, "file": file.name} for key, file in verdict.unknown],
        "passed": verdict.passed,
    }


def _finite(ratio: float) -> float | None:
    """JSON has no infinity: null stands for an error where none is allowed, or for no tensor at all."""
    return ratio if math.isfinite(ratio) else None

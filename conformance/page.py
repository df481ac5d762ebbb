"""The verdict as one HTML page that needs nothing else: no network, no other file, no script to read it."""

from __future__ import annotations

import hashlib
import re
from base64 import b64encode
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

from conformance.clauses import Clause, clauses
from conformance.plot import Plot, plot
from conformance.ratio import shown
from conformance.verdict import ClauseVerdict, Outcome, PortVerdict, Status

TEMPLATES = Path(__file__).parent / "templates"
WORDS: Mapping[Status, str] = {
    "pass": "pass",
    "fail": "fail",
    "xfail": "known failure",
    "xpass": "unexpected pass",
    "skip": "not asked",
    "not-provided": "not provided",
}
# The words carry the meaning; the signs let an eye run down a column.
SIGNS: Mapping[Status, str] = {
    "pass": "✓",
    "fail": "✗",
    "xfail": "≈",
    "xpass": "!",
    "skip": "–",
    "not-provided": "∅",
}
_CASE = "\n  case: "
_CODE = re.compile(r"`([^`]+)`")


@dataclass(frozen=True)
class Finding:
    """One layer of one port under a clause: its outcome, with the message taken apart."""

    outcome: Outcome
    plot: Plot | None

    @property
    def message(self) -> str:
        """What was wrong, without the layer's and the clause's names, which stand above it."""
        text = (
            self.outcome.message.replace(_CASE + self.case, "", 1)
            if self.case
            else self.outcome.message
        )
        for prefix in (f"{self.outcome.kind}: ", f"{self.outcome.clause}: "):
            text = text.removeprefix(prefix)
        return text

    @property
    def case(self) -> str:
        return self.outcome.message.partition(_CASE)[2].partition("\n")[0]


@dataclass(frozen=True)
class Cell:
    """A clause under a port: what the matrix shows, and the findings behind it."""

    port: int
    verdict: ClauseVerdict

    @property
    def status(self) -> Status:
        return self.verdict.status

    @property
    def layer(self) -> str:
        """The layers that the status is about, where they differ."""
        about = [o.kind for o in self.verdict.outcomes if o.status == self.status]
        return "" if len(about) == len(self.verdict.outcomes) else ", ".join(about)

    @property
    def ratio(self) -> str:
        asked = self.status not in ("skip", "not-provided")
        return shown(self.verdict.worst_ratio) if asked else ""

    @property
    def findings(self) -> tuple[Finding, ...]:
        return tuple(
            Finding(o, plot(o.margins) if o.margins else None) for o in self.verdict.outcomes
        )


@dataclass(frozen=True)
class Row:
    """A clause under all ports; a port that was not asked it has None."""

    clause: Clause
    cells: tuple[Cell | None, ...]

    @property
    def open(self) -> bool:
        """Whether there is something that a reader came for."""
        return any(cell and cell.verdict.failures for cell in self.cells)


def as_html(ports: Sequence[PortVerdict], suite: Mapping[str, Any]) -> str:
    """The page of a run: its settings, a matrix of clauses by ports, and what each clause found."""
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(prose=prose, breakable=breakable)
    style, script = (_source(name) for name in ("report.css", "report.js"))
    rows = _rows(ports)
    return environment.get_template("report.html.jinja").render(
        suite=suite,
        ports=ports,
        chapters=_by_chapter(rows),
        rows=rows,
        asked=len(rows),
        specified=len(clauses()),
        statuses=get_args(Status),
        counts={s: sum(_has(row, s) for row in rows) for s in get_args(Status)},
        words=WORDS,
        signs=SIGNS,
        style=Markup(style),
        script=Markup(script),
        style_hash=_hash(style),
        script_hash=_hash(script),
    )


def prose(text: str) -> Markup:
    """A sentence of SPEC.md, its `code` set as code, everything else escaped."""
    return Markup(_CODE.sub(r"<code>\1</code>", str(escape(text))))


def breakable(name: str) -> Markup:
    """A dotted or underscored name that may be broken after its separators."""
    return Markup(re.sub(r"([._/])(?=.)", r"\1<wbr>", str(escape(name))))


def _rows(ports: Sequence[PortVerdict]) -> list[Row]:
    verdicts = [{c.clause.id: c for c in port.clauses} for port in ports]
    rows = []
    for clause in clauses().values():
        found = [asked.get(clause.id) for asked in verdicts]
        if any(found):
            cells = (Cell(i, verdict) if verdict else None for i, verdict in enumerate(found))
            rows.append(Row(clause, tuple(cells)))
    return rows


def _by_chapter(rows: Sequence[Row]) -> dict[str, list[Row]]:
    chapters: dict[str, list[Row]] = {}
    for row in rows:
        chapters.setdefault(row.clause.chapter, []).append(row)
    return chapters


def _has(row: Row, status: Status) -> bool:
    return any(cell is not None and cell.status == status for cell in row.cells)


def _source(name: str) -> str:
    # With newlines around it, as the template sets it: the policy's hash is of exactly that text.
    return "\n" + (TEMPLATES / name).read_text(encoding="utf-8").strip() + "\n"


def _hash(text: str) -> str:
    """What the page's own content security policy allows to run, and nothing beside it."""
    return "sha256-" + b64encode(hashlib.sha256(text.encode()).digest()).decode()

"""The verdict in a terminal: a matrix of clauses by ports, then each failure with what repeats it."""

from __future__ import annotations

import io
from collections.abc import Sequence

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from conformance.ratio import shown
from conformance.spec import clauses
from conformance.verdict import ClauseVerdict, PortVerdict, Status

_STYLE: dict[Status, str] = {
    "pass": "green",
    "fail": "bold red",
    "xfail": "magenta",
    "xpass": "bold red",
    "skip": "yellow",
    "not-provided": "dim",
}
_SHOULD_MARK = " (should)"
_NARROWEST_SENTENCE = 24
_WORD: dict[Status, str] = {
    "pass": "pass",
    "fail": "FAIL",
    "xfail": "XFAIL",
    "xpass": "XPASS",
    "skip": "skip",
    "not-provided": "–",
}


def render(ports: Sequence[PortVerdict], *, width: int, colour: bool) -> str:
    """The matrix, the failures and a line per port, as text for a terminal of `width` columns."""
    out = io.StringIO()
    console = Console(file=out, force_terminal=colour, no_color=not colour, highlight=False)
    if ports:
        matrix = _matrix(ports, width)
        # A terminal narrower than the verdicts wraps lines; it does not lose them.
        console.width = max(width, console.measure(matrix).minimum)
        console.print(matrix)
        for port in ports:
            _print_failures(console, port)
            _print_skips(console, port)
        for port in ports:
            console.print(_summary(port), soft_wrap=True)
    return out.getvalue()


def _matrix(ports: Sequence[PortVerdict], total: int) -> Table:
    """One row per clause that was asked; the sentences give way to narrow terminals."""
    verdicts = [{c.clause.id: c for c in port.clauses} for port in ports]
    id_width = max(map(len, clauses())) + len(_SHOULD_MARK)
    port_widths = [_port_width(port) for port in ports]
    borders = 3 * (len(ports) + 2) + 1
    sentence_width = max(total - id_width - sum(port_widths) - borders, _NARROWEST_SENTENCE)
    table = Table(title="Status, and worst error / bound", title_justify="left")
    table.add_column("clause", width=id_width, no_wrap=True)
    table.add_column("sentence", width=sentence_width, no_wrap=True, overflow="ellipsis")
    for port, width in zip(ports, port_widths, strict=True):
        heading = "\n".join([*_folded(port.name, width), port.version])
        table.add_column(escape(heading), width=width, no_wrap=True)
    chapter = ""
    for clause in clauses().values():
        row = [asked.get(clause.id) for asked in verdicts]
        if not any(row):
            continue
        if clause.chapter != chapter:
            chapter = clause.chapter
            table.add_section()
        level = "" if clause.level == "MUST" else f"[dim]{_SHOULD_MARK}[/]"
        table.add_row(clause.id + level, escape(clause.sentence), *map(_cell, row))
    return table


def _port_width(port: PortVerdict) -> int:
    """Columns for the longest cell, and for the longest word of the heading."""
    cells = (Text.from_markup(_cell(c)).cell_len for c in port.clauses)
    return max([*cells, len(port.version), *(len(part) + 1 for part in port.name.split("."))])


def _folded(name: str, width: int) -> list[str]:
    """A dotted name broken at its dots into lines of at most `width`."""
    lines: list[str] = []
    for part in name.split("."):
        if lines and len(lines[-1]) + 1 + len(part) <= width:
            lines[-1] += f".{part}"
        else:
            lines.append(part if not lines else f".{part}")
    return lines


def _cell(verdict: ClauseVerdict | None) -> str:
    if verdict is None:
        return ""
    word = f"[{_STYLE[verdict.status]}]{_WORD[verdict.status]}[/]"
    kinds = [o.kind for o in verdict.outcomes if o.status == verdict.status]
    # Where the layers differ, the gravest status is shown with the layer that it is about.
    return f"{word} {kinds[0]}" if len(kinds) < len(verdict.outcomes) else word + _ratio(verdict)


def _ratio(verdict: ClauseVerdict) -> str:
    if verdict.status in ("skip", "not-provided"):
        return ""
    ratio = shown(verdict.worst_ratio)
    return f" {ratio}" if ratio else ""


def _print_failures(console: Console, port: PortVerdict) -> None:
    for verdict in port.clauses:
        if not verdict.failures:
            continue
        clause = verdict.clause
        console.print()
        console.print(
            f"[bold red]{clause.id}[/] {clause.level}, {escape(port.name)}: "
            f"{escape(clause.sentence)} [dim]({escape(clause.source)})[/]",
            soft_wrap=True,
        )
        for outcome in verdict.failures:
            for line in outcome.message.splitlines():
                console.print(f"  {escape(line)}", soft_wrap=True)
            console.print(f"  [cyan]again: {escape(outcome.reproduce)}[/]", soft_wrap=True)


def _print_skips(console: Console, port: PortVerdict) -> None:
    reasons: dict[str, list[str]] = {}
    for verdict in port.clauses:
        for outcome in verdict.outcomes:
            if outcome.status == "skip":
                label = f"{outcome.clause} ({outcome.kind})"
                reasons.setdefault(outcome.message, []).append(label)
    for reason, asked in reasons.items():
        console.print()
        console.print(
            f"[yellow]not asked[/] of {escape(port.name)}: {', '.join(asked)}: {escape(reason)}",
            soft_wrap=True,
        )


def _summary(port: PortVerdict) -> str:
    must = port.count("fail", "MUST") + port.count("xfail", "MUST")
    should = port.count("fail", "SHOULD") + port.count("xfail", "SHOULD")
    counts = f"{port.count('pass')} clauses pass, {must} MUST and {should} SHOULD fail"
    also: dict[Status, str] = {
        "xfail": "known",
        "skip": "not asked",
        "not-provided": "not provided",
    }
    for status, words in also.items():
        counts += f", {port.count(status)} {words}" if port.count(status) else ""
    if not port.ran:
        return f"\n[bold red]{escape(port.name)}: nothing was decided[/]: no clause ran."
    word, style = ("conforms", "bold green") if port.passed else ("does not conform", "bold red")
    return f"\n[{style}]{escape(port.name)} {word}[/]: {counts}."

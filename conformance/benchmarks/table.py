"""The results in a terminal: a row for each layer of each scenario, then the targets."""

from __future__ import annotations

import io

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from conformance.benchmarks.contestants import ADALORA, LORA
from conformance.benchmarks.results import Entry, Ratio, Record, Results
from conformance.benchmarks.targets import TARGETS, reached


def render(results: Results, *, width: int, colour: bool) -> str:
    """Both tables, and what was left out, as text for a terminal of `width` columns."""
    out = io.StringIO()
    console = Console(file=out, force_terminal=colour, no_color=not colour, highlight=False)
    tables = [
        t
        for t in (_layers(results), _targets(results), _stacks(results), _allocators(results))
        if t.row_count
    ]
    for table in tables:
        # A narrow terminal wraps lines; it does not lose figures.
        console.width = max(width, _natural_width(table))
        console.print(table)
    for record in results.layers:
        for name, reason in record.left_out.items():
            said = f"left out: {name} in {record.scenario.id}: {reason}"
            console.print(f"[yellow]{escape(said)}[/]", soft_wrap=True)
    return out.getvalue()


def _layers(results: Results) -> Table:
    table = Table(
        title="Time over the base layer's, overhead over PEFT's, memory", title_justify="left"
    )
    for heading in ("scenario", "layer"):
        table.add_column(heading, no_wrap=True)
    headings = (
        "ms",
        "/ base",
        "overhead\n/ AdaLoRA",
        "overhead\n/ LoRA",
        "saved\nMB",
        "peak\nMB",
        "of the\nlimit",
    )
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)
    for record in results.layers:
        table.add_section()
        for number, entry in enumerate(record.entries):
            style = "bold" if entry.role == "port" else None
            first = record.scenario.id if number == 0 else ""
            table.add_row(first, escape(entry.contestant), *_figures(record, entry), style=style)
    return table


def _figures(record: Record, entry: Entry) -> list[str]:
    return [
        f"{entry.seconds * 1e3:.3f}",
        f"{entry.time_over_base:.2f}",
        ratio(entry.overhead_over.get(ADALORA)),
        ratio(entry.overhead_over.get(LORA)),
        "" if entry.saved_bytes is None else f"{entry.saved_bytes / 1e6:.2f}",
        f"{entry.peak_bytes / 1e6:.1f}",
        f"{entry.share_of_limit:.0%}",
    ]


def ratio(found: Ratio | None) -> str:
    """A ratio with half the width of its interval."""
    if found is None:
        return ""
    return f"{found.ratio:.2f} ±{(found.high - found.low) / 2:.2f}"


def _targets(results: Results) -> Table:
    table = Table(title="Targets", title_justify="left")
    for heading in ("target", "at most", "layer", "reached", "met"):
        table.add_column(heading)
    found = reached(results)
    for target in TARGETS:
        for port in dict.fromkeys(r.port for r in found):
            values = [r.value for r in found if r.target is target and r.port == port]
            if not values:
                continue
            met = sum(v <= target.most for v in values)
            spread = (
                f"{min(values):.2g} to {max(values):.2g}" if len(values) > 1 else f"{values[0]:.2g}"
            )
            mark = "[green]yes[/]" if met == len(values) else f"[red]{met} of {len(values)}[/]"
            table.add_row(target.sentence, f"{target.most:g}", escape(port), spread, mark)
    return table


def _stacks(results: Results) -> Table:
    table = Table(title="Stacks of layers: peak memory of a step", title_justify="left")
    for heading in ("layers", "between", "layer"):
        table.add_column(heading, no_wrap=True)
    for heading in ("peak MB", "/ base", "/ AdaLoRA"):
        table.add_column(heading, justify="right")
    for record in results.stacks:
        table.add_section()
        for number, e in enumerate(record.entries):
            first = (f"{record.layers} x {record.scenario.id}", record.between)
            table.add_row(
                *(first if number == 0 else ("", "")),
                escape(e.contestant),
                f"{e.peak_bytes / 1e6:.1f}",
                *(f"{e.peak_over[o]:.3f}" if o in e.peak_over else "" for o in ("base", ADALORA)),
            )
    return table


def _allocators(results: Results) -> Table:
    table = Table(title="Rank allocators", title_justify="left")
    for heading in ("adapters", "allocator"):
        table.add_column(heading, no_wrap=True)
    for heading in ("step ms", "and masking ms", "penalty ms", "state MB"):
        table.add_column(heading, justify="right")
    for record in results.allocators:
        for e in record.entries:
            table.add_row(
                f"{record.adapters}, rank {record.rank}",
                escape(e.contestant),
                f"{e.step_seconds * 1e3:.1f}",
                f"{e.allocating_step_seconds * 1e3:.1f}",
                f"{e.penalty_seconds * 1e3:.1f}",
                f"{e.state_bytes / 1e6:.0f}",
            )
    return table


def _natural_width(table: Table) -> int:
    """The width at which nothing wraps."""
    return Console(width=1000).measure(table).maximum

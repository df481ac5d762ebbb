"""The picture: for each training scenario how many times the base layer's time each layer takes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

from conformance.benchmarks.contestants import FULL
from conformance.benchmarks.results import Entry, Record, Results, Role

_ROW, _LEFT, _WIDTH, _TOP = 22, 300, 520, 62
_COLOURS: dict[Role, str] = {"port": "#0b6e4f", "adalora": "#c8553d", "lora": "#d9a441"}
_LIMIT = "#888"


def picture(results: Results) -> str:
    """An SVG: a row for each scenario of 512 tokens or more, a dot for each layer, a tick for the limit."""
    records = [r for r in results.layers if r.scenario.mode == "step" and r.scenario.tokens >= 512]
    last = math.ceil(max([e.time_over_base for r in records for e in _shown(r)] or [2.0]))
    height = _TOP + _ROW * (len(records) + 1)
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_LEFT + _WIDTH + 40} {height}" '
        'role="img" font-family="sans-serif" font-size="12">',
        "<title>Forward and backward: time over the base layer's</title>",
        '<rect width="100%" height="100%" fill="white"/>',
        f'<text x="{_LEFT}" y="18" font-weight="bold">forward and backward, time / base layer</text>',
        *_legend(records),
    ]
    for number in range(last - 1 + 1):
        x = _x(1.0 + number, last)
        lines.append(f'<path d="M{x} {_TOP - 6}V{height - 12}" stroke="#ddd"/>')
        lines.append(f'<text x="{x}" y="{_TOP - 10}" text-anchor="middle">{1 + number}</text>')
    for number, record in enumerate(records):
        lines += _row(record, _TOP + _ROW * number + 10, last)
    lines.append("</svg>")
    return "\n".join(lines) + "\n"


def _row(record: Record, y: int, last: int) -> list[str]:
    shown = _shown(record)
    if not shown:
        return []
    times = ", ".join(f"{e.contestant} {e.time_over_base:.2f}" for e in shown)
    label = f'<text x="{_LEFT - 12}" y="{y + 4}" text-anchor="end">{record.scenario.id}</text>'
    base = record.entry("base")
    limit = 1.0 + record.limit_seconds / base.seconds if base else 1.0
    at = _x(limit, last)
    return [
        f"<g><title>{record.scenario.id}: {escape(times)}</title>",
        label,
        f'<path d="M{_x(1.0, last)} {y}H{_x(max(e.time_over_base for e in shown), last)}" '
        'stroke="#eee" stroke-width="3"/>',
        f'<path d="M{at} {y - 6}v12" stroke="{_LIMIT}" stroke-width="2"/>',
        *(
            f'<circle cx="{_x(e.time_over_base, last)}" cy="{y}" r="5" '
            f'fill="{_COLOURS[e.role]}" fill-opacity="0.9"/>'
            for e in shown
        ),
        "</g>",
    ]


def _legend(records: Sequence[Record]) -> list[str]:
    names = dict.fromkeys((e.contestant, _COLOURS[e.role]) for r in records for e in _shown(r))
    lines, x = [], _LEFT
    for name, colour in names:
        lines.append(f'<circle cx="{x + 5}" cy="34" r="5" fill="{colour}"/>')
        lines.append(f'<text x="{x + 15}" y="38">{escape(name)}</text>')
        x += 30 + 8 * len(name)
    lines.append(f'<path d="M{x + 5} 28v12" stroke="{_LIMIT}" stroke-width="2"/>')
    lines.append(f'<text x="{x + 13}" y="38">the limit</text>')
    return lines


def _shown(record: Record) -> list[Entry]:
    return [e for e in record.entries if e.role != "base" and not e.contestant.endswith(FULL)]


def _x(ratio: float, last: int) -> float:
    return round(_LEFT + _WIDTH * (ratio - 1.0) / max(1, last - 1), 1)

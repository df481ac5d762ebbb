"""What campaigns found, a row for each variant and profile, kept in docs/false-alarms.json.

A campaign may be of a few variants, as after a change of theirs: the others keep their rows, each with
the fingerprint of the sources that it is about.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from tests.campaigns.journal import ROOT
from tests.false_alarms.campaign import HONEST, Finding, reproducer

PATH = ROOT / "docs" / "false-alarms.json"


@dataclass(frozen=True)
class Row:
    """One variant under all the seeds of one profile.

    asked: clauses, each of each layer. compared: elements and facts. alarms: each with its reproducer.
    """

    variant: str
    profile: str
    seeds: int
    asked: int
    examples: int
    compared: int
    worst_ratio: float
    sources: str
    alarms: tuple[str, ...] = ()


def rows_of(findings: Iterable[Finding], sources: str) -> list[Row]:
    """The findings of one campaign, in any order, under the fingerprint of its sources."""
    by_row: dict[tuple[str, str], list[Finding]] = defaultdict(list)
    for finding in sorted(findings, key=lambda f: (f.variant, f.profile, f.seed)):
        by_row[finding.variant, finding.profile].append(finding)
    return [
        Row(
            variant,
            profile,
            seeds=len(found),
            asked=sum(f.asked for f in found),
            examples=sum(f.examples for f in found),
            compared=sum(f.compared for f in found),
            worst_ratio=round(max(f.worst_ratio for f in found), 4),
            sources=sources,
            alarms=tuple(_told(f, alarm) for f in found for alarm in f.alarms),
        )
        for (variant, profile), found in by_row.items()
    ]


def merged(kept: Iterable[Row], new: Iterable[Row]) -> list[Row]:
    """New rows in the place of old ones, by variant and profile; variants that are gone have none."""
    by_row = {(row.variant, row.profile): row for row in (*kept, *new)}
    return [row for (variant, _), row in sorted(by_row.items()) if variant in HONEST]


def load(path: Path = PATH) -> list[Row]:
    """The rows of a file; none if there is no file."""
    if not path.exists():
        return []
    entries = json.loads(path.read_text(encoding="utf-8"))
    return [Row(**{**entry, "alarms": tuple(entry["alarms"])}) for entry in entries]


def save(rows: Sequence[Row], path: Path = PATH) -> None:
    """Write the rows, a line each."""
    lines = ",\n".join(json.dumps(asdict(row), ensure_ascii=False) for row in rows)
    path.write_text(f"[\n{lines}\n]\n", encoding="utf-8")


def _told(finding: Finding, alarm: dict[str, str]) -> str:
    return f"{finding.variant}, {alarm['kind']}: {alarm['message']}\n{reproducer(finding, alarm)}"

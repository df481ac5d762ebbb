"""docs/false-alarms.md, written from what a campaign found."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

from tests.campaigns.journal import ROOT
from tests.false_alarms.rows import Row

PAGE = ROOT / "docs" / "false-alarms.md"
HEAD = """# False alarms

Written by `python -m tests.false_alarms` from [false-alarms.json](false-alarms.json); not by hand.

Every honest variant below (layers of `tests/mutants/variants.py`, allocators of
`tests/mutants/allocator_variants.py`) is asked every clause that concerns it. A seed decides what a clause
searches, and nothing else: under the first seed everything is asked, under a later one the searches
alone, since probes and the clauses that do not search would be asked the same again. Variants share
the cases of a seed. *Compared* counts elements and facts; *error / bound* is the largest seen.
*Sources* is a digest of the suite and the variants as they were then: a campaign may be of what has changed.

{verdict}

| profile | variants | seeds each | runs | clauses asked | examples | compared | error / bound | alarms |
|---|---|---|---|---|---|---|---|---|
{totals}

## What no alarm says about the rate

By the rule of three, no alarm in n independent runs puts the rate below 3 / n, with 95 % confidence.

| profile | 3 / runs, if variants counted as independent | 3 / seeds, if they did not count |
|---|---|---|
{rates}

## Variant by variant

| variant | profile | seeds | examples | compared | error / bound | alarms | sources |
|---|---|---|---|---|---|---|---|
{rows}
{alarms}
## With

{versions}.
"""


def render(rows: Sequence[Row], *, versions: Mapping[str, str]) -> str:
    """The page, for rows in any order."""
    rows = sorted(rows, key=lambda r: (r.variant, r.profile))
    by_profile: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        by_profile[row.profile].append(row)
    count = sum(len(row.alarms) for row in rows)
    runs = sum(row.seeds for row in rows)
    return HEAD.format(
        verdict=f"**{count or 'No'} alarm{'' if count == 1 else 's'}** in {runs} runs.",
        totals="\n".join(_total(name, found) for name, found in by_profile.items()),
        rates="\n".join(_rate(name, found) for name, found in by_profile.items()),
        rows="\n".join(map(_row, rows)),
        alarms="".join(f"\n```\n{alarm}\n```\n" for row in rows for alarm in row.alarms),
        versions=", ".join(f"{name} {version}" for name, version in versions.items()),
    )


def write(text: str, path: Path = PAGE) -> None:
    path.write_text(text, encoding="utf-8")


def _seeds(found: Sequence[Row]) -> str:
    """How many, as a range if variants differ."""
    least, most = min(r.seeds for r in found), max(r.seeds for r in found)
    return str(most) if least == most else f"{least} to {most}"


def _sums(found: Sequence[Row]) -> str:
    return (
        f"{sum(r.examples for r in found):,} | {sum(r.compared for r in found):,} | "
        f"{max(r.worst_ratio for r in found):.3f} | {sum(len(r.alarms) for r in found)}"
    )


def _total(profile: str, found: Sequence[Row]) -> str:
    asked, runs = sum(r.asked for r in found), sum(r.seeds for r in found)
    return f"| {profile} | {len(found)} | {_seeds(found)} | {runs} | {asked:,} | {_sums(found)} |"


def _rate(profile: str, found: Sequence[Row]) -> str:
    if any(r.alarms for r in found):
        return f"| {profile} | there were alarms | there were alarms |"
    runs, seeds = sum(r.seeds for r in found), min(r.seeds for r in found)
    return f"| {profile} | {3 / runs:.1e} | {3 / seeds:.1e} |"


def _row(row: Row) -> str:
    return f"| {row.variant} | {row.profile} | {row.seeds} | {_sums([row])} | `{row.sources[:8]}` |"

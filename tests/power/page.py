"""docs/power.md, written from what was measured."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from tests.campaigns.journal import ROOT
from tests.mutants.gallery import MUTANTS
from tests.power.killing import SEEDS, Death, chapters

PAGE = ROOT / "docs" / "power.md"
HEAD = """# Power: what the suite catches

Written by `{command}`; not by hand.

{count} mutants: the honest layer, allocator or penalty of `tests/mutants`, each with one planted fault.
*Quick* and *standard* say under how many of {seeds} seeds the mutant's own chapter kills it. A seed
decides what a clause searches, not its probes: *certain* means that a probe kills it, whatever the seed.
The clauses on real weights are asked in standard only.

**Kill rate over {seeds} seeds: {standard} in standard, {quick} in quick.** {certain} die by a probe.

## By kind of fault

| kind | mutants | certain | quick | standard |
|---|---|---|---|---|
{kinds}

## By chapter

| home chapter | mutants | certain | quick | standard |
|---|---|---|---|---|
{homes}

## Faults that show in one corner only

| only | mutants | certain | quick | standard |
|---|---|---|---|---|
{corners}

## Mutant by mutant

{explained}
| mutant | home | kind | only | killed by | certain | quick | standard |{columns}
|---|---|---|---|---|---|---|---|{rules}
{rows}

## With

{versions}; fingerprint of the sources `{fingerprint}`.
"""

_EVERYWHERE = """
The last columns say which chapters notice, by probes or by the search of seed 0.
"""


def render(
    deaths: Sequence[Death], *, command: str, versions: Mapping[str, str], fingerprint: str
) -> str:
    """The page, in the gallery's order."""
    found = {death.mutant: death for death in deaths}
    ordered = [found[name] for name in MUTANTS if name in found]
    # Without `--everywhere` a death knows of its own chapter only.
    shown = chapters() if any(len(death.noticed) > 1 for death in ordered) else ()
    return HEAD.format(
        command=command,
        count=len(ordered),
        seeds=len(SEEDS),
        quick=_percent(ordered, lambda d: d.quick),
        standard=_percent(ordered, lambda d: d.standard),
        certain=sum(d.certain for d in ordered),
        kinds=_table(ordered, lambda d: MUTANTS[d.mutant].kind),
        homes=_table(ordered, lambda d: MUTANTS[d.mutant].home),
        corners=_table(
            [d for d in ordered if MUTANTS[d.mutant].only], lambda d: str(MUTANTS[d.mutant].only)
        ),
        explained=_EVERYWHERE if shown else "",
        columns="".join(f" {chapter} |" for chapter in shown),
        rules="---|" * len(shown),
        rows="\n".join(_row(death, shown) for death in ordered),
        versions=", ".join(f"{name} {version}" for name, version in versions.items()),
        fingerprint=fingerprint,
    )


def _table(deaths: Sequence[Death], key: Callable[[Death], str]) -> str:
    groups: dict[str, list[Death]] = {}
    for death in deaths:
        groups.setdefault(key(death), []).append(death)
    return "\n".join(
        f"| {name} | {len(of)} | {sum(d.certain for d in of)} | {_percent(of, lambda d: d.quick)} "
        f"| {_percent(of, lambda d: d.standard)} |"
        for name, of in groups.items()
    )


def _percent(deaths: Sequence[Death], count: Callable[[Death], int]) -> str:
    share = 100.0 * sum(map(count, deaths)) / (len(SEEDS) * max(1, len(deaths)))
    # Rounded down: 99.96 % is not all of them.
    return "100 %" if share == 100.0 else f"{int(share * 10) / 10:.1f} %"


def _row(death: Death, shown: Sequence[str]) -> str:
    mutant = MUTANTS[death.mutant]
    cells = [
        mutant.name,
        mutant.home,
        mutant.kind,
        mutant.only or "",
        ", ".join(death.killed_by),
        "yes" if death.certain else "",
        f"{death.quick}/{len(SEEDS)}",
        f"{death.standard}/{len(SEEDS)}",
        *("x" if chapter in death.noticed else "" for chapter in shown),
    ]
    return "| " + " | ".join(cells) + " |"

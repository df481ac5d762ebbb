"""docs/false-alarms.md, written from what a campaign found."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

from tests.campaigns.journal import ROOT
from tests.false_alarms.campaign import Finding, reproducer

PAGE = ROOT / "docs" / "false-alarms.md"
HEAD = """# False alarms

Written by `{command}`; not by hand.

Every honest variant (`tests/mutants/variants.py`) is asked every clause on layers, and every honest allocator
(`tests/mutants/allocator_variants.py`) the chapter on rank allocation. A seed decides what a clause
searches, and nothing else: under the first seed everything is asked, under a later one the searches
alone, since probes and the clauses that do not search would be asked the same again. Variants share
the cases of a seed. *Compared* counts elements and facts; *error / bound* is the largest seen.

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

| variant | profile | seeds | examples | compared | error / bound | alarms |
|---|---|---|---|---|---|---|
{rows}
{alarms}
## With

{versions}; fingerprint of the sources `{fingerprint}`.
"""


def render(
    findings: Sequence[Finding], *, command: str, versions: Mapping[str, str], fingerprint: str
) -> str:
    """The page, for findings in any order."""
    by_profile: dict[str, list[Finding]] = defaultdict(list)
    by_variant: dict[tuple[str, str], list[Finding]] = defaultdict(list)
    for finding in sorted(findings, key=lambda f: (f.variant, f.profile, f.seed)):
        by_profile[finding.profile].append(finding)
        by_variant[finding.variant, finding.profile].append(finding)
    alarmed = [f for f in findings if f.alarms]
    count = sum(len(f.alarms) for f in alarmed)
    return HEAD.format(
        command=command,
        verdict=f"**{count or 'No'} alarm{'' if count == 1 else 's'}** in {len(findings)} runs.",
        totals="\n".join(_total(name, found) for name, found in by_profile.items()),
        rates="\n".join(_rate(name, found) for name, found in by_profile.items()),
        rows="\n".join(_row(*key, found) for key, found in by_variant.items()),
        alarms="".join(map(_alarms, alarmed)),
        versions=", ".join(f"{name} {version}" for name, version in versions.items()),
        fingerprint=fingerprint,
    )


def write(text: str, path: Path = PAGE) -> None:
    path.write_text(text, encoding="utf-8")


def _seeds(found: Sequence[Finding]) -> int:
    return len({f.seed for f in found})


def _sums(found: Sequence[Finding]) -> str:
    return (
        f"{sum(f.examples for f in found):,} | {sum(f.compared for f in found):,} | "
        f"{max(f.worst_ratio for f in found):.3f} | {sum(len(f.alarms) for f in found)}"
    )


def _total(profile: str, found: Sequence[Finding]) -> str:
    variants = len({f.variant for f in found})
    asked = sum(f.asked for f in found)
    return (
        f"| {profile} | {variants} | {_seeds(found)} | {len(found)} | {asked:,} | {_sums(found)} |"
    )


def _rate(profile: str, found: Sequence[Finding]) -> str:
    if any(f.alarms for f in found):
        return f"| {profile} | there were alarms | there were alarms |"
    return f"| {profile} | {3 / len(found):.1e} | {3 / _seeds(found):.1e} |"


def _row(variant: str, profile: str, found: Sequence[Finding]) -> str:
    return f"| {variant} | {profile} | {_seeds(found)} | {_sums(found)} |"


def _alarms(finding: Finding) -> str:
    return "".join(
        f"\n```\n{finding.variant}, {alarm['kind']}: {alarm['message']}\n{reproducer(finding, alarm)}\n```\n"
        for alarm in finding.alarms
    )

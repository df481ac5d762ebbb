"""`python -m tests.false_alarms`: honest layers under many seeds, resumable, and docs/false-alarms.md.

`--variant` asks a few; the others keep the rows that they have in docs/false-alarms.json.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from conformance.profile import PROFILES
from conformance.spec import clauses
from tests.campaigns.journal import ROOT, Journal, fingerprint, versions
from tests.campaigns.searching import searches
from tests.campaigns.workers import WorkerError, forked
from tests.false_alarms import page, rows
from tests.false_alarms.campaign import HONEST, Finding, Unit, ask_unit, reproducer, units
from tests.mutants.asking import kinds

JOURNAL = ROOT / ".campaigns" / "false-alarms.jsonl"
TIMEOUT = 3600.0


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code 0: no alarm. 1: an alarm, or a worker that failed. 130: stopped; run again to go on."""
    given = _parser().parse_args(arguments)
    console = Console()
    warm_up()
    journal = Journal(given.journal, fingerprint())
    findings = [Finding(**entry) for entry in journal]
    names = given.variant or list(HONEST)
    wanted = [(p, s) for p, seeds in _seeds(given) for s in seeds]
    if given.clause:
        work = [Unit(p, s, tuple(names), tuple(given.clause)) for p, s in wanted]
    else:
        done = {(f.variant, f.profile, f.seed) for f in findings}
        work = [u for p, seeds in _seeds(given) for u in units(p, seeds, names, done)]
    findings = [f for f in findings if f.variant in names and (f.profile, f.seed) in set(wanted)]
    if given.clause:
        findings = []
    try:
        with _progress(console) as progress:
            task = progress.add_task("runs", total=len(wanted) * len(names))
            progress.advance(task, len(findings))
            for unit, found in forked(ask_unit, work, jobs=given.jobs, timeout=TIMEOUT):
                findings += found
                for finding in found:
                    if not given.clause:
                        journal.append(finding.as_entry())
                    _show(console, finding)
                progress.advance(task, len(unit.variants))
    except KeyboardInterrupt:
        console.print(f"Stopped. What is finished is in {given.journal}; run again to go on.")
        return 130
    except WorkerError as error:
        console.print(f"[red]{error}")
        return 1
    alarms = sum(len(f.alarms) for f in findings)
    if not given.clause and given.seed is None:
        kept = rows.merged(rows.load(given.rows), rows.rows_of(findings, journal.under))
        rows.save(kept, given.rows)
        page.write(page.render(kept, versions=versions()), given.page)
    console.print(f"{alarms} alarms in {len(findings)} runs.")
    return 1 if alarms else 0


def warm_up() -> None:
    """What every worker needs, once: bitsandbytes compiles, and modules load, so the digest is whole."""
    logging.getLogger("torch._dynamo").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    for clause in clauses():
        for kind in kinds(clause):
            searches(clause, kind)
    ask_unit(Unit("quick", 0, tuple(HONEST)[:1], ("FWD-1", "GRAD-23", "DTYPE-1")))


def _seeds(given: argparse.Namespace) -> list[tuple[str, range]]:
    chosen = {"quick": given.quick_seeds, "standard": given.standard_seeds}
    if given.seed is not None:
        return [(given.profile or "quick", range(given.seed, given.seed + 1))]
    return [(p, range(n)) for p, n in chosen.items() if n and given.profile in (None, p)]


def _show(console: Console, finding: Finding) -> None:
    for alarm in finding.alarms:
        console.print(
            f"[red]{finding.variant}, {alarm['kind']}[/]: {alarm['message']}", markup=True
        )
        console.print(f"  again: {reproducer(finding, alarm)}", markup=False, soft_wrap=True)


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=console,
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tests.false_alarms", description=__doc__)
    parser.add_argument("--quick-seeds", type=int, default=200, metavar="N")
    parser.add_argument("--standard-seeds", type=int, default=20, metavar="N")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--variant", action="append", choices=list(HONEST), metavar="NAME")
    parser.add_argument("--profile", choices=list(PROFILES)[:2], help="this profile only")
    parser.add_argument(
        "--seed", type=int, help="this seed only (of quick, or of --profile); nothing is written"
    )
    parser.add_argument(
        "--clause", action="append", choices=list(clauses()), metavar="ID",
        help="these clauses only: to see an alarm again; nothing is written",
    )  # fmt: skip
    parser.add_argument(
        "--journal", type=Path, default=JOURNAL, help="where finished runs are kept"
    )
    parser.add_argument(
        "--rows",
        type=Path,
        default=rows.PATH,
        help="results by variant, which are brought up to date",
    )
    parser.add_argument("--page", type=Path, default=page.PAGE, help="the page that is written")
    return parser


if __name__ == "__main__":
    sys.exit(main())

"""`python -m tests.power`: how every mutant dies, resumable, and docs/power.md."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from rich.console import Console
from rich.progress import track

from tests.campaigns.journal import ROOT, Journal, fingerprint, versions
from tests.campaigns.workers import WorkerError, forked
from tests.false_alarms.__main__ import warm_up
from tests.mutants.gallery import MUTANTS
from tests.power import page
from tests.power.killing import SEEDS, Death, death_of

JOURNAL = ROOT / ".campaigns" / "power.jsonl"
TIMEOUT = 900.0
QUICK_RATE = 0.97


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code 0: all die in standard, and 97 % in quick. 1: not so. 130: stopped; run again to go on."""
    given = _parser().parse_args(arguments)
    console = Console()
    warm_up()
    under = fingerprint() + ("-everywhere" if given.everywhere else "")
    journal = Journal(given.journal, under)
    names = given.mutant or list(MUTANTS)
    deaths = [d for d in map(Death.from_entry, journal) if d.mutant in names]
    left = [name for name in names if name not in {d.mutant for d in deaths}]
    try:
        results = forked(
            partial(death_of, elsewhere=given.everywhere),
            left,
            jobs=given.jobs,
            timeout=TIMEOUT,
        )
        for name, death in track(results, "mutants", total=len(left), console=console):
            journal.append(death.as_entry())
            deaths.append(death)
            if death.standard < len(SEEDS) or death.quick < len(SEEDS):
                console.print(f"{name}: quick {death.quick}, standard {death.standard}")
    except KeyboardInterrupt:
        console.print(f"Stopped. What is finished is in {given.journal}; run again to go on.")
        return 130
    except WorkerError as error:
        console.print(f"[red]{error}")
        return 1
    command = "python -m tests.power" + (" --everywhere" if given.everywhere else "")
    text = page.render(deaths, command=command, versions=versions(), fingerprint=under)
    given.page.write_text(text, encoding="utf-8")
    quick = sum(d.quick for d in deaths) / (len(SEEDS) * len(deaths))
    standard = all(d.standard == len(SEEDS) for d in deaths)
    console.print(
        f"{len(deaths)} mutants; quick {quick:.1%}; standard {'all' if standard else 'NOT all'}."
    )
    return 0 if standard and quick >= QUICK_RATE else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tests.power", description=__doc__)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument(
        "--everywhere",
        action="store_true",
        help="ask every other chapter too, once (hours): the page then says which of them notice",
    )
    parser.add_argument("--mutant", action="append", choices=list(MUTANTS), metavar="NAME")
    parser.add_argument("--journal", type=Path, default=JOURNAL, help="where results are kept")
    parser.add_argument("--page", type=Path, default=page.PAGE, help="the page that is written")
    return parser


if __name__ == "__main__":
    sys.exit(main())

"""`python -m tests.mutation`: judge every mutant of `qsvd`, then write docs/mutation.md.

A run that is cut off goes on where it stopped, and one after a change judges the mutants of functions that
have changed; `--anew` judges all whose verdict is of other sources. `--only TEXT` judges the mutants whose
name has the text; `--report` writes the page from what was judged before.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from tests.mutation.classified import ClassificationError
from tests.mutation.mutants import Mutant, all_mutants
from tests.mutation.page import write_page
from tests.mutation.results import Results, Verdict

if TYPE_CHECKING:
    from tests.mutation.judge import Judge

# Seconds of clauses: most mutants die in less.
SOON = 5.0


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.mutation", description=__doc__)
    parser.add_argument("--only", metavar="TEXT", default="", help="judge these mutants alone")
    parser.add_argument("--report", action="store_true", help="judge nothing, write the page")
    parser.add_argument("--anew", action="store_true", help="judge all under these very sources")
    given = parser.parse_args(arguments)
    mutants = all_mutants()
    results = Results(mutants, anew=given.anew)
    if not given.report:
        judge_all([m for m in mutants if given.only in m.name], results)
    if given.only:
        return 0
    results.tidy()
    try:
        write_page(mutants, results.current, len(results.exact))
    except ClassificationError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


def judge_all(mutants: Sequence[Mutant], results: Results) -> None:
    """Judge what has no verdict yet, a verdict a line in the results' file."""
    waiting = [m for m in mutants if m.name not in results.current]
    if not waiting:
        return
    from tests.mutation.judge import Judge  # a minute of warming up

    judge = Judge()
    columns = (
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[alive]} alive  {task.description}"),
    )
    alive = 0
    with Progress(*columns) as progress:
        bar = progress.add_task("", total=len(waiting), alive=0)
        # What dies soon goes first, and what may live is asked at length when all have been asked.
        for within in (SOON, float("inf")):
            undecided = []
            for mutant in waiting:
                progress.update(bar, description=f"{mutant.file}: {mutant.function}")
                try:
                    verdict = judged(judge, mutant, results, within)
                except RuntimeError as error:
                    progress.console.print(f"No verdict: {mutant.name}: {error}", markup=False)
                    continue
                if verdict is None:
                    undecided.append(mutant)
                    continue
                results.add(mutant.name, verdict)
                alive += not verdict.clause
                progress.update(bar, advance=1, alive=alive)
            waiting = undecided


def judged(judge: Judge, mutant: Mutant, results: Results, within: float) -> Verdict | None:
    """The verdict, if it takes no more than `within` seconds of clauses."""
    if known := results.survivors.get(mutant.name):
        return judge.judge_survivor(mutant, known.asked)
    former = results.former.get(mutant.name, Verdict())
    return judge.judge(mutant, former.clause, within)


if __name__ == "__main__":
    sys.exit(main())

"""`python -m tests.calibration`: measure error / bound of all honest implementations, and write it down."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from tests.calibration import report, running, sensitivity, statistics


def main(arguments: Sequence[str] | None = None) -> int:
    """Run, write, and say what reached a bound; 1 if anything did."""
    parser = argparse.ArgumentParser(prog="python -m tests.calibration", description=__doc__)
    parser.add_argument("--cases", type=int, default=20_000, help="random cases (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="decides all cases (%(default)s)")
    parser.add_argument("--processes", type=int, default=2, help="workers (%(default)s)")
    parser.add_argument(
        "--work",
        type=Path,
        default=Path("build/calibration"),
        help="where judged cases are kept; a run that was interrupted goes on there (%(default)s)",
    )
    parser.add_argument(
        "--docs", type=Path, default=Path("docs"), help="where the page goes (%(default)s)"
    )
    parser.add_argument(
        "--sizes",
        type=int,
        nargs="+",
        default=sensitivity.IN_FEATURES,
        help="widths of the layers whose sensitivity is computed (%(default)s)",
    )
    given = parser.parse_args(arguments)
    if given.cases < 6 or given.processes < 1:
        parser.error(
            "`--cases` must be at least 6, one for each layer and dtype, and `--processes` 1."
        )

    ratios = running.ratios(given.cases, given.seed, given.processes, given.work)
    found, alarms = statistics.distributions(ratios), statistics.alarms(ratios, given.seed)
    seen = list(sensitivity.sensitivities(sizes=given.sizes))
    widths = statistics.widths(ratios, given.seed)
    report.write(given.docs, found, widths, seen, alarms, ratios, given.seed)

    console = Console()
    for d in found:
        if d.implementation == "all":
            console.print(
                f"{d.operation:18} {d.dtype:9} {d.rule:11} {d.count:7,} runs  "
                f"median {d.median:.3f}  99.9 % {d.p999:.3f}  max {d.maximum:.3f}",
                highlight=False,
            )
    for alarm in alarms:
        console.print(
            f"{alarm.implementation}, {alarm.operation}, {alarm.rule}: error / bound is "
            f"{alarm.ratio:.3g} in --case '{alarm.case}'",
            highlight=False,
            soft_wrap=True,
        )
    return 1 if alarms else 0


if __name__ == "__main__":
    sys.exit(main())

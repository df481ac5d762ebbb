"""`python -m conformance.benchmarks`: docs/performance.md and its picture, from what was measured."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from conformance.benchmarks.page import write

DOCS = Path(__file__).parents[2] / "docs"


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code 0: written. 2: there are no results, or of another version."""
    parser = argparse.ArgumentParser(
        prog="python -m conformance.benchmarks",
        description=f"{__doc__} Measure first: pytest conformance/benchmarks --results=JSON.",
    )
    parser.add_argument(
        "--docs", type=Path, default=DOCS, help="the folder with performance/results.json"
    )
    given = parser.parse_args(arguments)
    try:
        written = write(given.docs)
    except (FileNotFoundError, ValueError) as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 2
    for path in written:
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""`python -m tests.field`: replay our faults through the field's rules, and write docs/field.md."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

from conformance.spec import KINDS
from tests.field.campaign import ROOT, Plan
from tests.field.page import page
from tests.field.study import study


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.field", description=__doc__)
    parser.add_argument("--seeds", type=int, default=Plan.seeds, help="batches of cases (3)")
    parser.add_argument("--random", type=int, default=Plan.random, help="random cases a batch (12)")
    parser.add_argument("--layer", choices=KINDS, help="one of the two layers only")
    parser.add_argument("--no-clauses", action="store_true", help="leave out the clause set")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes (all)")
    parser.add_argument("--out", type=Path, default=ROOT / "docs", help="folder of the page (docs)")
    parser.add_argument(
        "--cache",
        type=Path,
        default=ROOT / ".field",
        help="finished pieces, to go on from (.field)",
    )
    given = parser.parse_args()
    if given.seeds < 1 or given.random < 0 or given.jobs < 1:
        parser.error("--seeds and --jobs must be at least 1, --random at least 0.")
    plan = Plan(
        seeds=given.seeds,
        random=given.random,
        kinds=(given.layer,) if given.layer else KINDS,
        clauses=not given.no_clauses,
    )
    results = study(plan, given.cache, given.jobs)
    text = json.dumps(results.to_json(), separators=(",", ":"))
    (given.out / "field.json").write_text(text + "\n", encoding="utf-8")
    (given.out / "field.md").write_text(page(results), encoding="utf-8")
    print(f"Wrote {given.out / 'field.md'} and field.json beside it.")


if __name__ == "__main__":
    main()

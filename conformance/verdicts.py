"""Verdicts on real ports: judge one, write docs/verdicts.md from all that were judged, check the page.

    python -m conformance.verdicts judge conformance.ports.peft     # to docs/verdicts/peft-0.21.2.json
    python -m conformance.verdicts write                            # docs/verdicts.md and a page a port
    python -m conformance.verdicts check                            # whether the pages are up to date

Each release of PEFT has an environment of its own: `tox run -m verdicts` judges all of them and writes.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

import pytest

from conformance.verdict import Outcome
from conformance.verdict_page import pages
from conformance.verdict_record import (
    Finding,
    Record,
    RecordError,
    explain,
    load_explanations,
    load_records,
)

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "docs" / "verdicts"
# The kernel's name says nothing of the verdict; whether Linear4bit repacks itself does.
_UNTOLD_VERSIONS = ("platform",)


class _Outcomes:
    """A plugin that keeps each layer's outcome, with its own message and reproducer."""

    def __init__(self) -> None:
        self.found: list[Outcome] = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when != "call":
            return
        outcome = Outcome.from_properties(report.user_properties)
        if outcome is not None:
            self.found.append(outcome)


def judge(port: str, arguments: list[str]) -> Record:
    """Run the suite on one port.

    Raises:
        RecordError: when the suite could not be run.
    """
    from bitsandbytes.functional import has_avx512bf16

    outcomes = _Outcomes()
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        command = ["-q", "conformance", f"--port={port}", f"--report={report}", *arguments]
        code = pytest.main(command, plugins=[outcomes])
        if code not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED) or not report.is_file():
            raise RecordError(f"pytest {' '.join(command)} ended with {code}: no verdict.")
        content = json.loads(report.read_text(encoding="utf-8"))
    suite = {
        k: content["suite"][k] for k in ("version", "spec_version", "seed", "profile", "device")
    }
    versions = {k: v for k, v in content["suite"]["versions"].items() if k not in _UNTOLD_VERSIONS}
    suite |= {"arguments": arguments, "avx512_bf16": bool(has_avx512bf16()), "versions": versions}
    ratios = {
        (o.clause, o.kind): None if o.worst_ratio == float("inf") else round(o.worst_ratio, 4)
        for o in outcomes.found
    }
    findings = tuple(
        Finding(
            o.clause,
            o.kind,
            o.status,
            ratios[o.clause, o.kind],
            _portable(o.message) if o.status == "fail" else "",
            o.reproduce if o.status == "fail" else "",
        )
        for o in sorted(outcomes.found, key=lambda o: (o.clause, o.kind))
    )
    return Record(port, content["ports"][0]["version"], suite, findings)


def _portable(message: str) -> str:
    """The message without the folders of the machine that it was seen on."""
    for folder in (sys.prefix, str(ROOT)):
        message = message.replace(f"{folder}/", "")
    return message


def rendered() -> dict[Path, str]:
    """Every page by path, from the records and the explanations.

    Raises:
        RecordError: when they are not in step.
    """
    records = load_records(FOLDER)
    explanations = load_explanations(FOLDER / "explanations.toml")
    return pages(records, explanations, explain(records, explanations), FOLDER)


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m conformance.verdicts", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    judging = commands.add_parser("judge", help="run the suite on one port and keep what was found")
    judging.add_argument("port", help="a dotted name, as for `pytest conformance --port`")
    judging.add_argument("--profile", default="standard", help="as for pytest (default: standard)")
    judging.add_argument(
        "--into", type=Path, default=FOLDER, help="where to (default: docs/verdicts)"
    )
    commands.add_parser("write", help="write the pages")
    commands.add_parser("check", help="fail if a page is not what `write` would write")
    given, further = parser.parse_known_args(arguments)
    if further and given.command != "judge":
        parser.error(f"unknown arguments: {' '.join(further)}")
    try:
        if given.command == "judge":
            # What else is given (`--max-examples=8`, `--clause=FWD-1`) is pytest's.
            record = judge(given.port, [f"--profile={given.profile}", *further])
            (given.into / f"{record.name}.json").write_text(record.to_json(), encoding="utf-8")
            return 0
        stale = [p for p, text in rendered().items() if not p.is_file() or p.read_text() != text]
        if given.command == "write":
            for path, text in rendered().items():
                path.write_text(text, encoding="utf-8")
            return 0
    except RecordError as error:
        print(error, file=sys.stderr)
        return 1
    for path in stale:
        print(f"{path.relative_to(ROOT)} is stale: python -m conformance.verdicts write")
    return 1 if stale else 0


if __name__ == "__main__":
    sys.exit(main())

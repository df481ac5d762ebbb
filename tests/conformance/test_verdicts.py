"""The verdicts on real ports: records, explanations and pages are in step, and none can be forgotten."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from conformance.verdict_record import (
    Explanation,
    Finding,
    Record,
    RecordError,
    explain,
    load_explanations,
    load_records,
)
from conformance.verdicts import FOLDER, ROOT, rendered

PASSES = Finding("FWD-1", "4bit", "pass", 0.3)
FAILS = Finding("DTYPE-1", "8bit", "fail", None, "8bit: DTYPE-1: y is torch.float32", "pytest x")
SUITE = {
    "spec_version": "1.0",
    "seed": 0,
    "device": "cpu",
    "arguments": ["--profile=quick"],
    "avx512_bf16": False,
    "versions": {"torch": "2.13.0"},
}
RECORD = Record("conformance.ports.peft", "0.9.0", SUITE, (PASSES, FAILS))
CAUSE = Explanation("peft", ("DTYPE-1",), "It divides after the cast.")


@pytest.mark.parametrize("page", [p.relative_to(ROOT) for p in rendered()], ids=str)
def test_a_page_is_what_its_records_say(page: Path) -> None:
    """
    Every page is, byte for byte, what the committed records give.
    """
    assert (ROOT / page).read_text(encoding="utf-8") == rendered()[ROOT / page]


def test_a_record_survives_its_file() -> None:
    """
    A record read back is the record that was written.
    """
    assert Record.from_json(RECORD.to_json()) == RECORD


def test_a_failure_without_an_explanation_is_an_error() -> None:
    """
    The message names port, clause, layer and what was seen.
    """
    with pytest.raises(RecordError, match=r"peft-0\.9\.0 DTYPE-1 8bit is not explained: .*float32"):
        explain([RECORD], [])


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (replace(CAUSE, clauses=("DTYPE-1", "FWD-1")), "FWD-1 does not fail"),
        (replace(CAUSE, since="0.10.0"), "is about no port that was judged"),
        (replace(CAUSE, port="other"), "is about no port that was judged"),
        (replace(CAUSE, message="bfloat16"), "DTYPE-1 does not fail"),
        (replace(CAUSE, layer="4bit"), "DTYPE-1 does not fail"),
        (replace(CAUSE, clauses=("*",), message="no such"), r"\* does not fail"),
    ],
)
def test_an_explanation_of_what_does_not_fail_is_an_error(entry: Explanation, message: str) -> None:
    """
    An entry has to be about a failure in every release of its range.
    """
    with pytest.raises(RecordError, match=message):
        explain([RECORD], [CAUSE, entry] if entry.clauses != ("DTYPE-1",) else [entry, CAUSE])


def test_the_first_entry_explains() -> None:
    """
    A specific entry before a general one takes its failures.
    """
    narrow = replace(CAUSE, until="0.9.0")
    general = Explanation("peft", ("*",), "Anything.", since="0.10.0")
    newer = replace(RECORD, version="0.10.0")

    found = explain([RECORD, newer], [narrow, general])

    assert found == {("peft-0.9.0", "DTYPE-1", "8bit"): 0, ("peft-0.10.0", "DTYPE-1", "8bit"): 1}


def test_releases_are_compared_as_numbers() -> None:
    """
    0.10 is newer than 0.9.
    """
    assert not replace(CAUSE, until="0.9.0").concerns(replace(RECORD, version="0.10.0"))


def test_explanations_with_unknown_clauses_are_refused(tmp_path: Path) -> None:
    """
    A misspelt clause would explain nothing, and is named.
    """
    path = tmp_path / "explanations.toml"
    path.write_text('[[explanation]]\nport = "peft"\ncause = "x"\nclauses = ["FWD-99"]\n')

    with pytest.raises(RecordError, match=r"no clause .*FWD-99"):
        load_explanations(path)


def test_every_judged_release_has_its_pins_and_its_environment() -> None:
    """
    A record of PEFT names a release whose constraints are kept and whose environment tox knows.
    """
    environments = (ROOT / "tox.ini").read_text(encoding="utf-8")

    for record in load_records(FOLDER):
        if record.family == "peft":
            pins = ROOT / "conformance" / "ports" / "releases" / f"{record.name}.txt"
            assert f"peft=={record.version}\n" in pins.read_text(encoding="utf-8")
            assert record.version in environments


def test_a_port_is_judged_into_a_record(tmp_path: Path) -> None:
    """
    `judge` keeps each layer's finding, with a message and a reproducer where it fails.
    """
    port = "tests/conformance/ports/wrong_scale.py"
    command = [sys.executable, "-m", "conformance.verdicts", "judge", port, f"--into={tmp_path}"]
    command += ["--profile=quick", "--clause=SCALE-2", "--layer=4bit"]

    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)

    assert run.returncode == 0, run.stdout + run.stderr
    (record,) = load_records(tmp_path)
    (finding,) = record.findings
    assert (record.family, finding.clause, finding.layer) == ("wrong_scale", "SCALE-2", "4bit")
    assert finding.failed
    assert "expected 3.0" in finding.message
    assert "--clause=SCALE-2" in finding.reproduce

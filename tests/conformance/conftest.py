"""One real run of the suite, judged once and read by every test of its reports."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.conformance.command import PORTS, run_suite

ASKED = ("FWD-1", "FWD-2", "FWD-21", "SCALE-2", "MERGE-6", "INIT-7")


@pytest.fixture(scope="session")
def reported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `verdict.json`, `verdict.html` and `junit.xml` of four ports and six clauses."""
    folder = tmp_path_factory.mktemp("reports")
    names = ("honest_port", "wrong_scale", "only_4bit", "accepts_any_rank")
    done = run_suite(
        *("-q", "--junitxml=junit.xml", "--max-examples=2"),
        *(f"--port={PORTS / name}.py" for name in names),
        *(f"--clause={clause}" for clause in ASKED),
        *("--report=verdict.json", "--report=verdict.html"),
        cwd=folder,
    )
    assert done.returncode == 1, done.stdout + done.stderr
    return folder

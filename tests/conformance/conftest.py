"""One real run of the suite, judged once and read by every test of its reports."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PORTS = Path(__file__).with_name("ports")
ASKED = ("FWD-1", "FWD-2", "FWD-21", "SCALE-2", "MERGE-6", "INIT-7")


@pytest.fixture(scope="session")
def reported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `verdict.json`, `verdict.html` and `junit.xml` of four ports and six clauses."""
    folder = tmp_path_factory.mktemp("reports")
    names = ("honest_port", "wrong_scale", "only_4bit", "accepts_any_rank")
    done = subprocess.run(
        [
            *(sys.executable, "-m", "pytest", str(ROOT / "conformance"), "-q"),
            *("-p", "no:cacheprovider", "--junitxml=junit.xml", "--max-examples=2"),
            *(f"--port={PORTS / name}.py" for name in names),
            *(f"--clause={clause}" for clause in ASKED),
            *("--report=verdict.json", "--report=verdict.html"),
        ],
        cwd=folder,
        env={**os.environ, "CI": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1, done.stdout + done.stderr
    return folder

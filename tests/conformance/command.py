"""The suite as its users run it, in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[2]
PORTS = Path(__file__).with_name("ports")


def run_suite(*arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """`pytest conformance/ ...` in a process of its own, from any folder."""
    folder = os.path.relpath(ROOT / "conformance", cwd)
    # Most users have not asked Python for unbuffered output.
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONUNBUFFERED"}
    return subprocess.run(
        [sys.executable, "-m", "pytest", folder, "-p", "no:cacheprovider", *arguments],
        cwd=cwd,
        capture_output=True,
        text=True,
        env={**environment, "CI": "1", "COLUMNS": "120"},
        check=False,
    )


_ONE_BY_ONE = """
import contextlib, io, json, sys
import pytest
found = []
for arguments in json.loads(sys.argv[1]):
    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
        code = pytest.main(["conformance", "-p", "no:cacheprovider", *arguments])
    found.append((code, said.getvalue()))
print(json.dumps(found))
"""


def run_suite_repeatedly(runs: Sequence[Sequence[str]]) -> list[tuple[int, str]]:
    """Exit code and stderr of `pytest conformance/ ...` with each list of arguments, in one process."""
    done = subprocess.run(
        [sys.executable, "-c", _ONE_BY_ONE, json.dumps(runs)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, "CI": "1", "COLUMNS": "120"},
        check=True,
    )
    return [(code, said) for code, said in json.loads(done.stdout)]

"""The suite as its users run it, in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
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

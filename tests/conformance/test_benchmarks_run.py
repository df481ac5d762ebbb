"""Benchmarks as they are run: only by those who name the folder, and with every figure written down."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from jsonschema import Draft202012Validator

from conformance.benchmarks.conftest import bench_of
from conformance.benchmarks.results import SCHEMA_PATH
from tests.conformance.command import PORTS, ROOT, run_suite


def run_benchmarks(*arguments: str) -> subprocess.CompletedProcess[str]:
    # A worker of pytest-xdist says so in the environment, and pytest-benchmark would take its child for one.
    own = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_XDIST")}
    return subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "conformance/benchmarks",
            "-p",
            "no:cacheprovider",
            *arguments,
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**own, "COLUMNS": "120"},
        check=False,
    )


def test_a_default_run_of_the_suite_has_no_benchmarks() -> None:
    done = run_suite("--collect-only", "-q")

    assert done.returncode == 0, done.stderr
    assert "test_forward.py" in done.stdout
    assert "benchmarks" not in done.stdout


def test_a_default_run_of_the_tests_has_none() -> None:
    """
    pytest without arguments runs `testpaths`, and the benchmarks are elsewhere.
    """
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert 'testpaths = ["tests"]' in text


def test_a_run_measures_everybody_in_turns_and_writes_it_down(tmp_path: Path) -> None:
    target, judged = tmp_path / "results.json", tmp_path / "benchmark.json"
    done = run_benchmarks(
        *(f"--port={PORTS / 'honest_port.py'}", "--threads=1", "--clock=cpu"),
        *(
            "--only=tokens=1",
            "--only=dtype=float32",
            "--only=in_features=1024",
            "--only=mode=forward",
            "--only=repack=no",
        ),
        *("--seconds=0", "--rounds=3", f"--results={target}", f"--benchmark-json={judged}"),
        *(f"--ignore=conformance/benchmarks/test_{name}.py" for name in ("allocators", "stacks")),
    )

    assert done.returncode == 0, done.stdout + done.stderr
    assert "4 passed" in done.stdout
    assert "conforms" not in done.stdout  # nobody is judged
    assert "4bit-fp32-1x1024x1024-r8-forward" in done.stdout
    assert "1 to 16 tokens: time over PEFT AdaLoRA's" in done.stdout
    results = json.loads(target.read_text(encoding="utf-8"))
    Draft202012Validator(json.loads(SCHEMA_PATH.read_text(encoding="utf-8"))).validate(results)
    entries = results["layers"][0]["entries"]
    assert [e["contestant"] for e in entries] == [
        "base",
        "honest_port",
        "PEFT AdaLoRA",
        "PEFT LoRA",
    ]
    # pytest-benchmark was told of the same times.
    told = json.loads(judged.read_text(encoding="utf-8"))["benchmarks"]
    for mine, theirs in zip(entries, told, strict=True):
        assert theirs["stats"]["rounds"] == results["layers"][0]["rounds"] == 3
        assert abs(theirs["stats"]["median"] / mine["seconds"] - 1) < 1e-3


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"only": ["width=3"]}, "FIELD one of kind"),
        ({"port": ["no.such.port"]}, "does not import"),
        ({"clock": "cpu"}, "give --threads=1 as well"),
    ],
)
def test_what_is_asked_for_in_vain_is_refused(given: dict[str, Any], said: str) -> None:
    options = {"device": "cpu", "port": None, "grid": "default", "only": [], "seconds": 1.0}
    options |= {"rounds": 1, "threads": 2, "clock": "wall", "results": None, "append": False}
    with pytest.raises(pytest.UsageError, match=said):
        bench_of(SimpleNamespace(**{**options, **given}))

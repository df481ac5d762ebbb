"""A verdict depends on the seed, and not on the number of processes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from conformance.case import Case
from conformance.port import port_from_module
from conformance.profile import QUICK
from conformance.strategies import cases
from conformance.trial import Trial
from tests.conformance.command import PORTS, run_suite
from tests.conformance.conftest import ASKED
from tests.mutants import honest


@pytest.mark.parametrize("processes", [("-n", "2"), ("--in-process",)], ids=" ".join)
def test_a_second_run_gives_the_same_verdict_in_however_many_processes(
    processes: tuple[str, ...], reported: Path
) -> None:
    """
    `reported` asked this port, and others, in one process each: same seed, clauses and folder.
    """
    done = run_suite(
        *(f"--port={PORTS / 'wrong_scale.py'}", "--max-examples=2", "--report=again.json"),
        *(f"--clause={clause}" for clause in ASKED),
        *processes,
        cwd=reported,
    )
    assert done.returncode == 1, done.stdout + done.stderr
    once, again = (verdict(reported / name) for name in ("verdict.json", "again.json"))

    assert any(c["status"] == "fail" for c in again["port"]["clauses"])
    assert json.dumps(again) == json.dumps(once)


def verdict(path: Path) -> dict[str, Any]:
    """What a report says of the run, but for its time, and of the port."""
    report: dict[str, Any] = json.loads(path.read_text())
    del report["suite"]["time"]
    (port,) = (port for port in report["ports"] if port["name"] == "wrong_scale")
    return {"suite": report["suite"], "port": port}


def search(asked: int, seed: int = 0) -> list[Case]:
    """The cases that a search comes by when it is asked for so many."""
    found: list[Case] = []
    port, profile = port_from_module(honest, "honest"), replace(QUICK, max_examples=asked)
    trial = Trial(port=port, kind="4bit", profile=profile, seed=seed)
    trial.search(cases("4bit"), found.append)
    assert trial.examples == len(found)
    return found


def test_examples_grow_linearly_with_what_is_asked() -> None:
    assert [len(search(n)) for n in (10, 20, 40)] == [10, 20, 40]


def test_a_seed_decides_the_cases() -> None:
    assert search(8, seed=1) == search(8, seed=1)
    known, strangers = set(search(8, seed=1)), set(search(8, seed=2))
    assert len(strangers & known) <= 2
    assert len(strangers) >= 6

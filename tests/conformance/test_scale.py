"""A verdict depends on the seed, and not on the number of processes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from conformance.case import Case
from conformance.port import port_from_module
from conformance.strategies import cases
from conformance.trial import Trial
from tests.conformance.command import PORTS, run_suite
from tests.mutants import honest


def verdict(path: Path, *arguments: str) -> str:
    """The report of a run, without its times, as text."""
    ports = [f"--port={PORTS / 'honest_port.py'}", f"--port={PORTS / 'wrong_scale.py'}"]
    asked = [f"--clause={c}" for c in ("FWD-1", "SCALE-2", "MERGE-6")]
    done = run_suite(*ports, *asked, f"--report={path}", *arguments)
    assert done.returncode == 1, done.stdout + done.stderr
    report: dict[str, Any] = json.loads(path.read_text())
    del report["suite"]["time"]
    return json.dumps(report)


def test_two_processes_give_the_verdict_of_one(tmp_path: Path) -> None:
    """
    Which is also a second run of the same seed.
    """
    one = verdict(tmp_path / "one.json")
    two = verdict(tmp_path / "two.json", "-n", "2")
    assert one == two


def test_examples_grow_linearly_with_what_is_asked() -> None:
    def examples(asked: int) -> int:
        from dataclasses import replace

        trial = Trial(port=port_from_module(honest, "honest"), kind="4bit")
        trial.profile = replace(trial.profile, max_examples=asked)
        trial.search(cases("4bit"), lambda case: None)
        return trial.examples

    assert [examples(n) for n in (10, 20, 40)] == [10, 20, 40]


def test_memorised_cases_are_of_no_use_under_another_seed() -> None:
    """
    A port that recognises every case of one seed meets almost only strangers in the next.
    """

    def drawn(seed: int) -> set[Case]:
        found: list[Case] = []
        Trial(port=port_from_module(honest, "honest"), kind="4bit", seed=seed).search(
            cases("4bit"), found.append
        )
        return set(found)

    known, asked = drawn(1), drawn(2)
    assert len(asked) >= 6
    assert len(asked & known) <= 2

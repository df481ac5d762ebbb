"""A small calibration run: no alarm, the same numbers twice, and what a bound that is reached leads to."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from conformance.case import Case
from tests.calibration import statistics
from tests.calibration.__main__ import main
from tests.calibration.drawing import case_of, masks_of
from tests.calibration.judging import OPERATIONS, RULES, implementations, judge


def test_a_small_run_has_no_alarm_and_can_be_taken_up(tmp_path: Path) -> None:
    """A chunk in this process; the second call judges nothing, and writes the same page."""
    options = [
        "--cases",
        "12",
        "--processes",
        "1",
        "--sizes",
        "4",
        "--work",
        str(tmp_path / "w"),
    ]
    assert main([*options, "--docs", str(tmp_path / "a")]) == 0
    (chunk,) = (tmp_path / "w").rglob("*.npy")
    written = chunk.stat().st_mtime_ns
    assert main([*options, "--docs", str(tmp_path / "b")]) == 0

    assert chunk.stat().st_mtime_ns == written
    for name in ("calibration.json", "calibration.md", "calibration.svg"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    found = json.loads((tmp_path / "a" / "calibration.json").read_text())["distributions"]
    judged = {(d["operation"], d["dtype"], d["rule"]) for d in found}
    assert len(judged) == len(OPERATIONS) * 5  # two arithmetics in 16 bits, one in fp32
    assert {d["implementation"] for d in found} == {"all", "nearest", *implementations()}
    # sanity check: what is compared has roundings in it
    assert max(d["maximum"] for d in found if d["operation"] == "y") > 0.3


def test_a_case_is_judged_alike_every_time() -> None:
    assert list(judge(case_of(3, 8))) == list(judge(case_of(3, 8)))


def test_cases_cover_layers_dtypes_adapters_and_dropout() -> None:
    cases = [case_of(0, number) for number in range(300)]
    assert len({(c.kind, c.dtype) for c in cases}) == 6
    assert {len(c.ranks) for c in cases} == {1, 2}
    assert {c.training for c in cases} == {True, False}
    dropped = next(c for c in cases if c.dropouts)
    assert all(m.shape == (*dropped.batch, dropped.in_features) for m in masks_of(dropped).values())


@pytest.mark.parametrize("reached", [1.0, np.inf])
def test_a_bound_that_is_reached_is_an_alarm_with_its_case(reached: float) -> None:
    given = np.zeros((6, len(implementations()), len(RULES), len(OPERATIONS)), np.float32)
    given[4, 1, 0, 2] = reached

    (alarm,) = statistics.alarms(given, seed=5)
    assert alarm.implementation == list(implementations())[1]
    assert (alarm.rule, alarm.operation) == (RULES[0], OPERATIONS[2])
    assert Case.from_json(alarm.case) == case_of(5, 4)


def test_a_run_of_no_cases_is_refused() -> None:
    with pytest.raises(SystemExit):
        main(["--cases", "0"])

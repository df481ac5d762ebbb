"""Hostile ports are found out, and the honest port beside them is judged as if it were alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.conformance.command import PORTS, run_suite

HONEST = PORTS / "honest_port.py"
HOSTILE = Path(__file__).with_name("hostile")
NAMES = ("crashes", "crashes_at_import", "hangs", "tampers", "lazy")
ASKED = ("FWD-1", "MERGE-1", "ENV-1", "ENV-3", "ENV-5")
COMMON = [*(f"--clause={c}" for c in ASKED), "--layer=4bit", "--max-examples=2", "--patience=15"]


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], str]:
    """The report's ports of one run of them all, by name, and what the run printed."""
    report = tmp_path_factory.mktemp("together") / "verdict.json"
    ports = [HONEST, *(HOSTILE / f"{name}.py" for name in NAMES)]
    # One clause at which the hanging port hangs is enough.
    done = run_suite(*(f"--port={p}" for p in ports), *COMMON, f"--report={report}")
    assert done.returncode == 1, done.stdout + done.stderr
    found = {port["name"]: port for port in json.loads(report.read_text())["ports"]}
    return found, done.stdout


def clause(port: dict[str, Any], identifier: str) -> dict[str, Any]:
    return next(c for c in port["clauses"] if c["id"] == identifier)


def test_the_neighbours_do_not_change_the_honest_ports_verdict(
    together: tuple[dict[str, Any], str], tmp_path: Path
) -> None:
    report = tmp_path / "alone.json"
    done = run_suite(f"--port={HONEST}", *COMMON, f"--report={report}")
    assert done.returncode == 0, done.stdout
    (alone,) = json.loads(report.read_text())["ports"]
    assert alone["passed"]
    assert together[0]["honest_port"] == alone


def test_a_crash_names_the_signal_the_place_and_the_case(together: tuple[Any, str]) -> None:
    failed = clause(together[0]["crashes"], "FWD-1")
    assert failed["status"] == "fail"
    assert "killed by SIGSEGV in `forward`" in failed["message"]
    assert "about to read the null pointer" in failed["message"]
    assert "--case=" in failed["reproduce"]


def test_a_port_that_crashed_is_asked_again(together: tuple[Any, str]) -> None:
    assert clause(together[0]["crashes"], "MERGE-1")["status"] == "pass"


def test_a_hang_ends_and_says_where_it_was(together: tuple[Any, str]) -> None:
    failed = clause(together[0]["hangs"], "FWD-1")
    assert "gave no answer for 15 s in `forward`" in failed["message"]
    assert "--case=" in failed["reproduce"]
    assert clause(together[0]["hangs"], "MERGE-1")["status"] == "pass"


def test_a_port_that_dies_at_import_fails_every_clause(together: tuple[Any, str]) -> None:
    port = together[0]["crashes_at_import"]
    assert not port["passed"]
    assert {c["status"] for c in port["clauses"]} == {"fail"}
    assert "killed by SIGABRT while it was loaded" in port["clauses"][0]["message"]


def test_tampering_is_reported(together: tuple[Any, str]) -> None:
    port = together[0]["tampers"]
    assert "torch's default dtype was torch.float32" in clause(port, "ENV-1")["message"]
    assert "torch.allclose" in clause(port, "ENV-3")["message"]
    assert "reference" in clause(port, "ENV-5")["message"]
    assert "the number of threads" in clause(port, "FWD-1")["message"]


def test_a_flood_does_not_reach_the_terminal(together: tuple[Any, str]) -> None:
    assert len(together[1]) < 100_000
    assert "noise noise" not in together[1]


def test_a_lazy_tensor_is_no_result(together: tuple[Any, str]) -> None:
    failed = clause(together[0]["lazy"], "FWD-1")
    assert "y is a Agreeable, expected a plain torch.Tensor" in failed["message"]

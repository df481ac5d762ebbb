"""Hostile ports are found out, and the honest port beside them is judged as if it were alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from conformance.chapters import test_of as decider_of
from conformance.profile import QUICK
from conformance.settings import Settings
from conformance.warden import Warden
from tests.conformance.command import PORTS, run_suite

HOSTILE = Path(__file__).with_name("hostile")
NAMES = ("crashes", "crashes_at_import", "hangs", "tampers")
# Of the clauses of the `reported` run: one that calls forward, one that does not, one that reads `merged`.
ASKED = ("FWD-1", "INIT-7", "MERGE-6")
PATIENCE = 10


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], str]:
    """The report's ports of one run of them all, by name, and what the run printed."""
    report = tmp_path_factory.mktemp("together") / "verdict.json"
    ports = [PORTS / "honest_port.py", *(HOSTILE / f"{name}.py" for name in NAMES)]
    done = run_suite(
        *(f"--port={port}" for port in ports),
        *(f"--clause={clause}" for clause in ASKED),
        *("--max-examples=2", f"--patience={PATIENCE}", f"--report={report}"),
    )
    assert done.returncode == 1, done.stdout + done.stderr
    found = {port["name"]: port for port in json.loads(report.read_text())["ports"]}
    return found, done.stdout + done.stderr


def clause(port: dict[str, Any], identifier: str) -> dict[str, Any]:
    found: dict[str, Any] = next(c for c in port["clauses"] if c["id"] == identifier)
    return found


def test_the_neighbours_do_not_change_the_honest_ports_verdict(
    together: tuple[dict[str, Any], str], reported: Path
) -> None:
    """
    `reported` is a run without hostile ports: same seed, same number of examples, more clauses.
    """
    ports = json.loads((reported / "verdict.json").read_text())["ports"]
    (without,) = (port for port in ports if port["name"] == "honest_port")
    amid = together[0]["honest_port"]

    assert amid["passed"]
    assert len(amid["clauses"]) == len(ASKED)
    assert amid["clauses"] == [c for c in without["clauses"] if c["id"] in ASKED]
    rest = without.keys() - {"clauses"}
    assert {key: amid[key] for key in rest} == {key: without[key] for key in rest}


def test_a_crash_names_the_signal_the_place_and_the_case(together: tuple[Any, str]) -> None:
    failed = clause(together[0]["crashes"], "FWD-1")
    assert failed["status"] == "fail"
    assert "killed by SIGSEGV in `forward`" in failed["message"]
    assert "about to read the null pointer" in failed["message"]
    assert "--case=" in failed["reproduce"]


def test_a_port_that_crashed_is_asked_again(together: tuple[Any, str]) -> None:
    assert clause(together[0]["crashes"], "INIT-7")["status"] == "pass"


def test_a_hang_ends_and_says_where_it_was(together: tuple[Any, str]) -> None:
    port = together[0]["hangs"]
    assert clause(port, "FWD-1")["status"] == "pass"
    failed = clause(port, "MERGE-6")
    assert failed["status"] == "fail"
    assert f"gave no answer for {PATIENCE} s in `merged`" in failed["message"]
    assert "--case=" in failed["reproduce"]


def test_a_port_that_dies_at_import_fails_every_clause(together: tuple[Any, str]) -> None:
    port = together[0]["crashes_at_import"]
    assert not port["passed"]
    assert [c["status"] for c in port["clauses"]] == ["fail"] * len(ASKED)
    assert "killed by SIGABRT while it was loaded" in port["clauses"][0]["message"]


def test_global_state_that_a_forward_changes_fails_the_clause_and_is_put_back(
    together: tuple[Any, str],
) -> None:
    port = together[0]["tampers"]
    failed = clause(port, "FWD-1")
    assert failed["status"] == "fail"
    for what in ("the number of threads", "the grad mode", "deterministic algorithms"):
        assert f"Left behind by the port: {what} was " in failed["message"]
    assert clause(port, "INIT-7")["status"] == "pass"


def test_an_allocator_that_dies_names_the_place_and_the_case() -> None:
    spec = str(HOSTILE / "dies_allocating.py")
    host = Warden(Settings(spec=spec, device="cpu", profile=QUICK, patience=PATIENCE))
    try:
        answer = host.ask(decider_of("RANK-8"), "4bit")
    finally:
        host.stop()
    assert answer.status == "fail"
    assert "killed by SIGSEGV in `choose`" in answer.message
    assert "about to read the null pointer" in answer.message
    assert answer.case is not None


def test_a_flood_does_not_reach_the_terminal(together: tuple[Any, str]) -> None:
    assert len(together[1]) < 100_000
    assert "noise noise" not in together[1]

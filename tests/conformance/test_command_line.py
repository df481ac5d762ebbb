"""The suite as its users run it: a process, an exit code, a table, a report."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.conformance.command import PORTS, run_suite, run_suite_repeatedly

HONEST = PORTS / "honest_port.py"


@pytest.fixture(scope="module")
def two_ports(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    """One run, from a foreign folder, of an honest port beside a wrong one."""
    folder = tmp_path_factory.mktemp("elsewhere")
    done = run_suite(
        f"--port={HONEST}",
        f"--port={PORTS / 'wrong_scale.py'}",
        "--clause=SCALE-2",
        "--clause=MERGE-6",
        "--clause=INIT-7",
        "--report=verdict.json",
        "--junitxml=junit.xml",
        cwd=folder,
    )
    return done, folder


def test_a_broken_must_clause_fails_the_run(two_ports: tuple[Any, Any]) -> None:
    done, _ = two_ports
    assert done.returncode == 1, done.stdout
    assert "honest_port conforms" in done.stdout
    assert "wrong_scale does not conform" in done.stdout


def test_a_failure_says_clause_values_bound_and_how_to_repeat_it(two_ports: Any) -> None:
    done, _ = two_ports
    assert "For lora_alpha > 0 the scaling is lora_alpha" in done.stdout
    assert "again: pytest" in done.stdout
    assert "--clause=SCALE-2" in done.stdout


def test_the_reproducing_line_reproduces(two_ports: Any) -> None:
    import shlex

    done, folder = two_ports
    line = next(ln for ln in done.stdout.splitlines() if ln.strip().startswith("again: pytest"))
    words = shlex.split(line.strip().removeprefix("again: pytest "))
    again = run_suite(*words[1:], cwd=folder)
    assert again.returncode == 1, again.stdout
    assert "SCALE-2" in again.stdout


def test_the_report_has_the_published_form(two_ports: Any) -> None:
    _, folder = two_ports
    report = json.loads((folder / "verdict.json").read_text())
    assert set(report) == {"suite", "ports"}
    assert {"version", "spec_version", "seed", "profile", "device", "versions"} <= set(
        report["suite"]
    )
    honest, wrong = report["ports"]
    assert (honest["name"], honest["passed"]) == ("honest_port", True)
    assert (wrong["name"], wrong["passed"]) == ("wrong_scale", False)
    status = {c["id"]: c["status"] for c in wrong["clauses"]}
    assert status == {"SCALE-2": "fail", "MERGE-6": "pass", "INIT-7": "pass"}
    failed = next(c for c in wrong["clauses"] if c["id"] == "SCALE-2")
    assert {"id", "level", "status", "examples", "worst_ratio", "message", "reproduce"} <= set(
        failed
    )


def test_junit_carries_the_clause_ids(two_ports: Any) -> None:
    _, folder = two_ports
    assert 'name="clause" value="SCALE-2"' in (folder / "junit.xml").read_text()


def test_a_missing_class_is_not_provided_and_no_failure() -> None:
    done = run_suite(f"--port={PORTS / 'only_4bit.py'}", "--clause=MERGE-1")
    assert done.returncode == 0, done.stdout
    assert "only_4bit conforms" in done.stdout


def test_a_port_that_was_asked_nothing_fails_the_run() -> None:
    done = run_suite(f"--port={PORTS / 'only_4bit.py'}", "--clause=FWD-21")
    assert done.returncode == 1, done.stdout
    assert "nothing was decided" in done.stdout


def test_a_broken_should_clause_is_told_and_does_not_fail_the_run() -> None:
    done = run_suite(f"--port={PORTS / 'accepts_any_rank.py'}", "--clause=INIT-7", "--layer=4bit")
    assert done.returncode == 0, done.stdout
    assert "accepts_any_rank conforms" in done.stdout
    assert "1 SHOULD fail" in done.stdout


WRONG = [
    (["--port=no_such_port"], "Port `no_such_port` does not import"),
    (["--device=cuda:77"], "--device cuda:77 cannot be used"),
    (["--max-examples=0"], "--max-examples must be at least 1, got 0."),
    (["--clause=FWD-0"], "--clause FWD-0: SPEC.md has no such clause."),
    (["--report=verdict.txt"], "the name must end in .json or .html."),
    (["--case={}"], "--case: Not a case"),
    (["--port=qsvd", "--port=qsvd"], "a port named `qsvd` is given already"),
]


@pytest.fixture(scope="module")
def refusals() -> list[tuple[int, str]]:
    """Exit code and stderr for each of `WRONG`, the suite being started once for all."""
    return run_suite_repeatedly([arguments for arguments, _ in WRONG])


@pytest.mark.parametrize("which", range(len(WRONG)), ids=[w[0][0] for w in WRONG])
def test_a_wrong_option_is_one_clean_line(which: int, refusals: list[tuple[int, str]]) -> None:
    code, said = refusals[which]
    assert code == 4
    assert WRONG[which][1] in said
    assert "Traceback" not in said

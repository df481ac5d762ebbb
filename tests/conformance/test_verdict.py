"""From outcomes to a verdict: what decides it, what is shown, what the report says."""

from __future__ import annotations

import json

from conformance.margin import Margin
from conformance.terminal import render
from conformance.verdict import Outcome, PortVerdict


def outcome(clause: str, kind: str, status: str, **more: object) -> Outcome:
    return Outcome(port="mine", clause=clause, kind=kind, status=status, **more)  # type: ignore[arg-type]


def verdict(*outcomes: Outcome) -> PortVerdict:
    return PortVerdict("mine", "1.0", list(outcomes))


def test_one_failing_layer_fails_the_clause() -> None:
    port = verdict(outcome("FWD-1", "4bit", "pass"), outcome("FWD-1", "8bit", "fail"))
    assert port.clauses[0].status == "fail"
    assert not port.passed
    assert not port.green


def test_a_should_clause_decides_nothing() -> None:
    port = verdict(outcome("FWD-1", "4bit", "pass"), outcome("INIT-7", "4bit", "fail"))
    assert port.passed
    assert port.green


def test_a_port_that_ran_nothing_has_not_passed() -> None:
    assert not verdict(outcome("FWD-1", "4bit", "skip")).passed
    assert not verdict(outcome("FWD-1", "4bit", "not-provided")).green
    assert not verdict().passed


def test_a_known_failure_keeps_the_run_green_and_the_port_failing() -> None:
    port = verdict(outcome("FWD-1", "4bit", "pass"), outcome("DTYPE-1", "8bit", "xfail"))
    assert port.green
    assert not port.passed


def test_an_unexpected_pass_is_not_green() -> None:
    assert not verdict(outcome("FWD-1", "4bit", "xpass")).green


def test_clauses_stand_in_the_order_of_the_specification() -> None:
    port = verdict(outcome("STATE-1", "4bit", "pass"), outcome("FWD-1", "4bit", "pass"))
    assert [c.clause.id for c in port.clauses] == ["FWD-1", "STATE-1"]


def test_outcomes_travel_as_properties() -> None:
    sent = outcome("FWD-1", "4bit", "fail", message="off", worst_ratio=2.5)
    assert Outcome.from_properties(sent.as_properties()) == sent
    assert Outcome.from_properties([("unrelated", 1)]) is None


def test_margins_travel_as_plain_data() -> None:
    margin = Margin.of("bfloat16", [0.3, 2.5])
    sent = outcome("FWD-1", "4bit", "fail", margins=(margin,))
    assert Outcome.from_properties(json.loads(json.dumps(sent.as_properties()))) == sent


def test_junit_gets_short_values_and_the_level() -> None:
    told = dict(outcome("INIT-7", "4bit", "fail", message="x" * 9999).for_junit())
    assert (told["clause"], told["level"], told["status"]) == ("INIT-7", "SHOULD", "fail")
    assert not {"message", "margins"} & set(told)


def test_the_table_shows_every_verdict_in_a_narrow_terminal() -> None:
    port = verdict(
        outcome("FWD-1", "4bit", "pass", worst_ratio=0.3142),
        outcome("FWD-2", "8bit", "fail", message="y[0] is off", reproduce="pytest --case='[x]'"),
        outcome("FWD-2", "4bit", "pass"),
        outcome("FWD-21", "8bit", "not-provided"),
    )
    text = render([port], width=60, colour=False)
    assert "pass 0.31" in text
    assert "FAIL 8bit" in text
    assert "y[0] is off" in text
    assert "again: pytest --case='[x]'" in text
    assert "mine does not conform: 1 clauses pass, 1 MUST and 0 SHOULD fail" in text

"""pytest's own JUnit file names the clause, what became of it, and how to repeat it."""

from __future__ import annotations

from pathlib import Path
from xml.etree import ElementTree

import pytest


@pytest.fixture
def cases(reported: Path) -> dict[tuple[str, str, str], ElementTree.Element]:
    """The test cases by port, clause and layer."""
    found = {}
    for case in ElementTree.parse(reported / "junit.xml").iter("testcase"):
        told = properties(case)
        found[told["port"], told["clause"], told["kind"]] = case
    return found


def properties(case: ElementTree.Element) -> dict[str, str]:
    entries = [(p.attrib["name"], p.attrib["value"]) for p in case.iter("property")]
    assert len(entries) == len(dict(entries)), "no property is told twice"
    return dict(entries)


def test_each_case_has_its_clause_level_status_and_ratio(
    cases: dict[tuple[str, str, str], ElementTree.Element],
) -> None:
    honest = properties(cases["honest_port", "FWD-1", "4bit"])
    assert (honest["level"], honest["status"], honest["reproduce"]) == ("MUST", "pass", "")
    assert 0 < float(honest["worst_ratio"]) <= 1
    assert properties(cases["only_4bit", "FWD-21", "8bit"])["status"] == "not-provided"


def test_a_failure_says_how_to_repeat_it(
    cases: dict[tuple[str, str, str], ElementTree.Element],
) -> None:
    case = cases["wrong_scale", "SCALE-2", "8bit"]
    told = properties(case)
    assert (told["status"], told["level"]) == ("fail", "MUST")
    assert "--clause=SCALE-2" in told["reproduce"]
    failure = case.find("failure")
    assert failure is not None
    assert "SCALE-2" in (failure.text or "")


def test_a_should_clause_is_told_as_one(
    cases: dict[tuple[str, str, str], ElementTree.Element],
) -> None:
    case = cases["accepts_any_rank", "INIT-7", "4bit"]
    assert properties(case)["level"] == "SHOULD"
    assert properties(case)["status"] == "fail"
    assert case.find("failure") is None


def test_no_property_is_a_page_long(cases: dict[tuple[str, str, str], ElementTree.Element]) -> None:
    assert len(cases) == 4 * 11
    for case in cases.values():
        told = properties(case)
        assert not {"message", "margins"} & set(told)
        assert max(map(len, told.values())) < 1000

"""The JSON report: valid by its published schema, whatever the run found, and never half written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator

from conformance.report import SCHEMA_PATH, as_json, write_report
from conformance.verdict import PortVerdict
from tests.conformance.outcomes import SUITE, all_failing, failing, outcome, port

SCHEMA = json.loads(SCHEMA_PATH.read_text(encoding="utf-8"))
VALIDATOR = Draft202012Validator(SCHEMA)


def test_the_schema_is_one() -> None:
    Draft202012Validator.check_schema(SCHEMA)


def test_the_schema_describes_every_key_and_admits_no_other() -> None:
    objects = [SCHEMA, *SCHEMA["$defs"].values(), SCHEMA["$defs"]["suite"]["properties"]["time"]]
    objects = [o for o in objects if o.get("type") == "object"]
    assert len(objects) == 7
    for found in objects:
        assert found["additionalProperties"] is False
        assert set(found["required"]) == set(found["properties"])
        for name, value in found["properties"].items():
            described = (
                SCHEMA["$defs"][value["$ref"].rpartition("/")[2]] if "$ref" in value else value
            )
            assert described["description"], name


def test_a_real_run_is_valid(reported: Path) -> None:
    report = json.loads((reported / "verdict.json").read_text(encoding="utf-8"))
    VALIDATOR.validate(report)
    names = [p["name"] for p in report["ports"]]
    assert names == ["honest_port", "wrong_scale", "only_4bit", "accepts_any_rank"]
    assert [p["passed"] for p in report["ports"]] == [True, False, True, True]
    assert report["suite"]["narrowed_by"][0] == "--clause=FWD-1"


def test_a_real_run_says_how_near_it_came_to_the_bounds(reported: Path) -> None:
    report = json.loads((reported / "verdict.json").read_text(encoding="utf-8"))
    honest, wrong = ({c["id"]: c for c in p["clauses"]} for p in report["ports"][:2])
    for kind in ("4bit", "8bit"):
        margins = honest["FWD-1"]["details"][kind]["margins"]
        assert {m["dtype"] for m in margins} == {"float32", "bfloat16", "float16"}
        assert all(0 < m["median"] <= m["worst"] <= 1 for m in margins)
        assert all(sum(m["bins"]) == m["count"] and m["bins"][-1] == 0 for m in margins)
    assert honest["FWD-2"]["details"]["4bit"]["margins"] == [], "nothing but equal bits is allowed"
    assert any(m["bins"][-1] for m in wrong["FWD-1"]["details"]["4bit"]["margins"])


@pytest.mark.parametrize(
    "found",
    [
        port(),
        port(outcome("FWD-1", "skip", message="no GPU"), outcome("FWD-1", "not-provided", "8bit")),
        port(outcome("FWD-5", "fail", worst_ratio=float("inf"), message="off", reproduce="pytest")),
        port(outcome("INIT-7", "xfail"), outcome("SCALE-2", "xpass"), failing("FWD-1", "8bit")),
        all_failing("mine"),
    ],
    ids=["nothing", "not asked", "infinite", "known", "everything fails"],
)
def test_whatever_was_found_is_valid(found: PortVerdict) -> None:
    # `allow_nan` would write Infinity, which is no JSON.
    VALIDATOR.validate(json.loads(json.dumps(as_json([found], SUITE), allow_nan=False)))


@pytest.mark.parametrize(
    "spoil",
    [
        lambda r: r["ports"][0].pop("passed"),
        lambda r: r["suite"].update(surprise=1),
        lambda r: r["ports"][0]["clauses"][0].update(status="ok"),
        lambda r: r["ports"][0]["clauses"][0]["details"]["4bit"]["margins"][0]["bins"].pop(),
        lambda r: r["ports"][0]["clauses"][0].update(worst_ratio="1"),
        lambda r: r["suite"]["time"].update(started="yesterday"),
    ],
)
def test_the_schema_refuses_what_is_not_a_report(spoil: Any) -> None:
    report = json.loads(json.dumps(as_json([port(failing("FWD-1", "4bit"))], SUITE)))
    assert VALIDATOR.is_valid(report)
    spoil(report)
    assert not VALIDATOR.is_valid(report)


def test_a_report_replaces_the_last_one_and_leaves_nothing_beside_it(tmp_path: Path) -> None:
    path = tmp_path / "verdict.json"
    for found in (port(), all_failing("mine")):
        write_report(path, [found], SUITE)
        assert json.loads(path.read_text())["ports"][0]["name"] == "mine"
    assert list(tmp_path.iterdir()) == [path]


def test_a_report_that_cannot_be_written_leaves_the_last_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "verdict.json"
    write_report(path, [port()], SUITE)
    before = path.read_bytes()

    def full(self: Path, text: str, **_: object) -> int:
        self.write_bytes(text.encode()[:10])
        raise OSError("No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match="No space"):
        write_report(path, [all_failing("mine")], SUITE)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]

"""Known failures: an entry is complete, in date and about something, or it is an error."""

from __future__ import annotations

import datetime
import json
from pathlib import Path

import pytest
import torch

from conformance.verdict import Outcome
from conformance.xfails import Xfail, XfailError, load_xfails, refuse_overlaps, stale
from tests.conformance.command import PORTS, run_suite

TODAY = datetime.date(2026, 1, 1)
ENTRY = """
[[xfail]]
port = "mine"
clause = "DTYPE-1"
layer = "8bit"
reason = "returns fp32"
link = "https://example.invalid/issues/1"
expires = 2026-06-30
"""


def load(tmp_path: Path, text: str) -> tuple[Xfail, ...]:
    file = tmp_path / "known.toml"
    file.write_text(text)
    return load_xfails(file, {"mine"}, TODAY)


def test_an_entry_covers_its_port_clause_and_layer(tmp_path: Path) -> None:
    (entry,) = load(tmp_path, ENTRY)
    assert entry.covers("mine", "DTYPE-1", "8bit")
    assert not entry.covers("mine", "DTYPE-1", "4bit")
    assert not entry.covers("other", "DTYPE-1", "8bit")


def test_an_entry_may_be_about_some_machines_only(tmp_path: Path) -> None:
    (everywhere,) = load(tmp_path, ENTRY)
    (cpu,) = load(tmp_path, ENTRY + 'only_on = "cpu"\n')
    (packed,) = load(tmp_path, ENTRY + 'only_on = "avx512_bf16"\n')
    here, there = torch.device("cpu"), torch.device("cuda")
    assert everywhere.applies(here)
    assert everywhere.applies(there)
    assert cpu.applies(here)
    assert not cpu.applies(there)
    assert not packed.applies(there)


def test_an_entry_may_be_about_real_weights_only(tmp_path: Path) -> None:
    (real,) = load(tmp_path, ENTRY + 'only_on = "real_model"\n')
    assert real.applies(torch.device("cpu"), real_model=True)
    assert not real.applies(torch.device("cpu"), real_model=False)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (('"DTYPE-1"', '"DTYPE-99"'), "SPEC.md has no such clause"),
        (('port = "mine"', 'port = "another"'), "no such port in this run"),
        (("2026-06-30", "2025-12-31"), "expired on 2025-12-31"),
        (("2026-06-30", '"soon"'), "`expires` must be a date"),
        (('"8bit"', '"16bit"'), "`layer` is '16bit'"),
        (('reason = "returns fp32"', ""), "lacks \\['reason'\\]"),
        (('reason = "returns fp32"', 'reason = ""'), "must be a text that is not empty"),
        (("https://example.invalid/issues/1", "docs/nowhere.py"), "link `docs/nowhere.py`"),
        (("https://example.invalid/issues/1", "javascript:alert(1)"), "is no https:// address"),
        (("https://example.invalid/issues/1", "#12"), "is no https:// address"),
        (("link =", 'only_on = "tpu"\nlink ='), "`only_on` is 'tpu'"),
        (("link =", "lnk = 1\nlink ="), "unknown keys \\['lnk'\\]"),
        (("[[xfail]]", "[[xfial]]"), "unknown tables \\['xfial'\\]"),
        (("[[xfail]]", "[xfail]"), "entries are \\[\\[xfail\\]\\]"),
        (("[[xfail]]", "[[xfail"), "known.toml"),
    ],
)
def test_a_bad_entry_is_an_error_that_names_it(
    tmp_path: Path, change: tuple[str, str], message: str
) -> None:
    with pytest.raises(XfailError, match=message):
        load(tmp_path, ENTRY.replace(*change))


def test_an_error_names_the_file_and_the_entry(tmp_path: Path) -> None:
    with pytest.raises(XfailError, match=r"known\.toml: entry 2 \(FWD-1 of mine, 8bit\): expired"):
        load(tmp_path, ENTRY + ENTRY.replace("DTYPE-1", "FWD-1").replace("2026-06", "2020-06"))


@pytest.mark.parametrize("link", ["notes.md", "notes.md#fp32", "docs/notes.md"])
def test_a_link_may_be_a_path_from_the_folder_or_from_one_above(tmp_path: Path, link: str) -> None:
    folder = tmp_path / "ports"
    folder.mkdir()
    for path in (folder / "notes.md", tmp_path / "docs" / "notes.md"):
        path.parent.mkdir(exist_ok=True)
        path.write_text("it returns fp32")
    (entry,) = load(folder, ENTRY.replace("https://example.invalid/issues/1", link))
    assert entry.link == link


def test_two_entries_may_not_be_about_one_thing(tmp_path: Path) -> None:
    both = load(tmp_path, ENTRY + ENTRY.replace('layer = "8bit"\n', ""))
    with pytest.raises(XfailError, match=r"entry 2 .* is there twice, first as .*entry 1"):
        refuse_overlaps(both)
    refuse_overlaps(load(tmp_path, ENTRY + ENTRY.replace("8bit", "4bit")))


def test_a_missing_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(XfailError, match="No such file"):
        load_xfails(tmp_path / "none.toml", {"mine"}, TODAY)


def test_an_empty_file_has_no_entries(tmp_path: Path) -> None:
    assert load(tmp_path, "# none\n") == ()


def outcome(kind: str, status: str, clause: str = "DTYPE-1", message: str = "") -> Outcome:
    return Outcome("mine", clause, kind, status, message=message)  # type: ignore[arg-type]


def test_an_entry_that_was_not_decided_is_stale(tmp_path: Path) -> None:
    entries = load(tmp_path, ENTRY)
    for status in ("skip", "not-provided"):
        found = [outcome("4bit", "pass"), outcome("8bit", status, message="no GPU")]
        (said,) = stale(entries, found, all_layers=True)
        assert "known.toml: entry 1 (DTYPE-1 of mine, 8bit): is stale" in said
        assert "8bit: no GPU" in said
        assert "only_on" in said


def test_an_entry_about_both_layers_needs_one(tmp_path: Path) -> None:
    entries = load(tmp_path, ENTRY.replace('layer = "8bit"\n', ""))
    lacks_one = [outcome("4bit", "xfail"), outcome("8bit", "not-provided")]
    assert stale(entries, lacks_one, all_layers=True) == ()
    lacks_both = [outcome("4bit", "skip"), outcome("8bit", "not-provided")]
    assert len(stale(entries, lacks_both, all_layers=True)) == 1


def test_an_entry_about_a_layer_that_the_clause_is_not_about_is_stale(tmp_path: Path) -> None:
    (entry,) = load(tmp_path, ENTRY.replace("DTYPE-1", "FWD-21").replace("8bit", "4bit"))
    found = [outcome("8bit", "pass", "FWD-21")]
    (said,) = stale([entry], found, all_layers=True)
    assert "is not asked of 4bit" in said
    assert stale([entry], found, all_layers=False) == (), "--layer=8bit did not ask the other"


def test_an_entry_that_was_not_asked_is_left_alone(tmp_path: Path) -> None:
    entries = load(tmp_path, ENTRY)
    assert stale(entries, [], all_layers=True) == ()
    assert stale(entries, [outcome("8bit", "skip", "FWD-1")], all_layers=True) == ()
    for status in ("xfail", "xpass"):
        assert stale(entries, [outcome("8bit", status)], all_layers=True) == ()


KNOWN = """
[[xfail]]
port = "{port}"
clause = "{clause}"
reason = "as planned"
link = "https://example.invalid/1"
expires = 2199-01-01
"""


def run_with(tmp_path: Path, *arguments: str, known: list[tuple[str, str]]) -> tuple[int, str]:
    """The suite on two ports with these known failures: the exit code, and what it said."""
    file = tmp_path / "known.toml"
    file.write_text("".join(KNOWN.format(port=p, clause=c) for p, c in known))
    done = run_suite(
        f"--port={PORTS / 'wrong_scale.py'}",
        f"--port={PORTS / 'only_4bit.py'}",
        f"--xfails-file={file}",
        *arguments,
    )
    return done.returncode, done.stdout + done.stderr


def test_known_failures_keep_a_narrowed_run_green(tmp_path: Path) -> None:
    """FWD-1 and FWD-21 are not asked, and one case that passes says nothing of the others."""
    code, said = run_with(
        tmp_path,
        *("--clause=SCALE-2", '--case={"kind":"4bit","ranks":[3]}'),
        known=[
            ("wrong_scale", "SCALE-2"),
            ("wrong_scale", "FWD-1"),
            ("only_4bit", "SCALE-2"),
            ("only_4bit", "FWD-21"),
        ],
    )
    assert code == 0, said
    assert "known: as planned (https://example.invalid/1)" in said
    assert "stale" not in said


def test_a_stale_entry_and_an_unexpected_pass_fail_the_run_and_are_named(tmp_path: Path) -> None:
    code, said = run_with(
        tmp_path,
        *("--clause=MERGE-6", "--clause=FWD-21", f"--report={tmp_path / 'verdict.json'}"),
        known=[("wrong_scale", "FWD-21"), ("only_4bit", "FWD-21"), ("only_4bit", "MERGE-6")],
    )
    assert code == 1, said
    assert "known.toml: entry 2 (FWD-21 of only_4bit): is stale" in said
    assert "MERGE-6 passes, although" in said
    assert "known.toml: entry 3 says: as planned. Remove the entry." in said
    (told,) = json.loads((tmp_path / "verdict.json").read_text())["suite"]["stale_xfails"]
    assert "entry 2" in told


def test_an_expired_entry_is_one_clean_line(tmp_path: Path) -> None:
    file = tmp_path / "known.toml"
    file.write_text(KNOWN.format(port="qsvd", clause="FWD-1").replace("2199", "2020"))
    done = run_suite(f"--xfails-file={file}")
    assert done.returncode == 4
    assert f"{file}: entry 1 (FWD-1 of qsvd): expired on 2020-01-01" in done.stderr
    assert "Traceback" not in done.stderr

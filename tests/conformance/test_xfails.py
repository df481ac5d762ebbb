"""Known failures: an entry is complete, in date and about something, or it is an error."""

from __future__ import annotations

import datetime
from pathlib import Path

import pytest
import torch

from conformance.xfails import XfailError, load_xfails

TODAY = datetime.date(2026, 1, 1)
ENTRY = """
[[xfail]]
port = "mine"
clause = "DTYPE-1"
layer = "8bit"
reason = "returns fp32"
link = "docs/defects/x.py"
expires = 2026-06-30
"""


def load(tmp_path: Path, text: str) -> tuple[object, ...]:
    file = tmp_path / "known.toml"
    file.write_text(text)
    return load_xfails(file, {"mine"}, TODAY)


def test_an_entry_covers_its_port_clause_and_layer(tmp_path: Path) -> None:
    (entry,) = load(tmp_path, ENTRY)
    assert entry.covers("mine", "DTYPE-1", "8bit")  # type: ignore[attr-defined]
    assert not entry.covers("mine", "DTYPE-1", "4bit")  # type: ignore[attr-defined]
    assert not entry.covers("other", "DTYPE-1", "8bit")  # type: ignore[attr-defined]


def test_an_entry_may_be_about_some_machines_only(tmp_path: Path) -> None:
    (everywhere,) = load(tmp_path, ENTRY)
    (cpu,) = load(tmp_path, ENTRY + 'only_on = "cpu"\n')
    (packed,) = load(tmp_path, ENTRY + 'only_on = "avx512_bf16"\n')
    here, there = torch.device("cpu"), torch.device("cuda")
    assert everywhere.applies(here)  # type: ignore[attr-defined]
    assert everywhere.applies(there)  # type: ignore[attr-defined]
    assert cpu.applies(here)  # type: ignore[attr-defined]
    assert not cpu.applies(there)  # type: ignore[attr-defined]
    assert not packed.applies(there)  # type: ignore[attr-defined]


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
        (("link =", 'only_on = "tpu"\nlink ='), "`only_on` is 'tpu'"),
        (("link =", "lnk = 1\nlink ="), "unknown keys \\['lnk'\\]"),
        (("[[xfail]]", "[[xfial]]"), "unknown tables \\['xfial'\\]"),
        (("[[xfail]]", "[[xfail"), "known.toml"),
    ],
)
def test_a_bad_entry_is_an_error_that_names_it(
    tmp_path: Path, change: tuple[str, str], message: str
) -> None:
    with pytest.raises(XfailError, match=message):
        load(tmp_path, ENTRY.replace(*change))


def test_an_entry_may_not_be_there_twice(tmp_path: Path) -> None:
    with pytest.raises(XfailError, match="is there twice"):
        load(tmp_path, ENTRY + ENTRY.replace('layer = "8bit"\n', ""))


def test_a_missing_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(XfailError, match="No such file"):
        load_xfails(tmp_path / "none.toml", {"mine"}, TODAY)


def test_an_empty_file_has_no_entries(tmp_path: Path) -> None:
    assert load(tmp_path, "# none\n") == ()

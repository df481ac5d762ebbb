"""The measurement of power: what it says of a mutant, and that its page is about this gallery."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.mutants.gallery import MUTANTS
from tests.mutants.mutant import chapter_of
from tests.power.__main__ import main
from tests.power.killing import SEEDS, Death, death_of
from tests.power.page import PAGE, render


def test_a_probe_kills_under_every_seed() -> None:
    death = death_of("forgets row 16 of a batch", elsewhere=False)
    assert death.certain
    assert (death.quick, death.standard) == (len(SEEDS), len(SEEDS))
    assert "FWD-16" in death.killed_by
    assert death.noticed == ("FWD",)


def test_a_harmless_mutant_survives(monkeypatch: pytest.MonkeyPatch) -> None:
    """The measurement can fail: an honest layer, entered as a mutant, dies under no seed."""
    from tests.mutants.mutant import Mutant
    from tests.mutants.variants import VARIANTS

    harmless = Mutant("harmless", VARIANTS["the honest layer"], ("MERGE-1",), "merge")
    monkeypatch.setitem(MUTANTS, "harmless", harmless)
    death = death_of("harmless", elsewhere=False)
    assert death == Death("harmless", (), False, 0, 0, ())
    page = render([death], command="c", versions={}, fingerprint="f")
    assert "0.0 % in standard" in page


def test_the_command_measures_and_resumes(tmp_path: Path) -> None:
    journal, page = tmp_path / "journal.jsonl", tmp_path / "page.md"
    arguments = ["--mutant=merges silently", f"--journal={journal}", f"--page={page}"]
    assert main(arguments) == 0
    assert "merges silently" in page.read_text()
    assert len(journal.read_text().splitlines()) == 1
    assert main(arguments) == 0
    assert len(journal.read_text().splitlines()) == 1


@pytest.mark.skipif(not PAGE.exists(), reason="the campaign has not been run yet")
def test_the_page_is_in_step_with_the_gallery() -> None:
    rows = re.findall(
        r"^\| (.+?) \| ([A-Z]+) \| (.+?) \| .*? \| .+? \| .*? \| \d+/\d+ \| (\d+)/(\d+) \|",
        PAGE.read_text(encoding="utf-8"),
        re.MULTILINE,
    )
    listed = {name: (home, kind) for name, home, kind, _, _ in rows}
    assert listed == {m.name: (chapter_of(m.kills[0]), m.kind) for m in MUTANTS.values()}
    assert [name for name, _, _, killed, of in rows if killed != of] == []

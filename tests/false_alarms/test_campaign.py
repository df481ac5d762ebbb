"""The campaign of false alarms asks what it says, goes on where it stopped, and shows an alarm again."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.campaigns.searching import HalfTrial, SharingTrial
from tests.false_alarms.__main__ import main
from tests.false_alarms.campaign import (
    HONEST,
    Finding,
    Unit,
    ask_unit,
    reproducer,
    units,
)
from tests.false_alarms.page import PAGE, render
from tests.false_alarms.rows import Row, load, merged, rows_of, save
from tests.mutants.asking import verdict
from tests.mutants.gallery import MUTANTS
from tests.mutants.variants import VARIANTS

NAMES = ("the honest layer", "folds E into B")
TINY = ["--quick-seeds=2", "--standard-seeds=0", "--jobs=1", *(f"--variant={n}" for n in NAMES)]


def test_there_are_enough_variants_and_they_differ() -> None:
    """Two variants that were the same layer would count one twice."""
    layers = {tuple(port.constructors.values()) for port in VARIANTS.values()}
    assert len(layers) == len(VARIANTS) >= 8


def test_what_is_finished_is_not_asked_again() -> None:
    done = {("the honest layer", "quick", 0)}
    left = list(units("quick", range(2), NAMES, done))
    assert [(u.seed, u.variants) for u in left] == [(0, NAMES[1:]), (1, NAMES)]


def test_sharing_a_search_changes_nothing() -> None:
    """The second variant, asked of the first one's cases, meets what it would have found itself."""
    shared: list = []  # type: ignore[type-arg]
    counts = []
    for name, trial_type in ((NAMES[0], SharingTrial), (NAMES[1], SharingTrial)):
        trial = trial_type(port=VARIANTS[name], kind="4bit", seed=3, cases=shared)
        trial.half = "search"
        assert verdict("FWD-1", trial) == ""
        counts.append((trial.examples, trial.compared, trial.worst_ratio))
    alone = HalfTrial(port=VARIANTS[NAMES[1]], kind="4bit", seed=3)
    alone.half = "search"
    assert verdict("FWD-1", alone) == ""
    assert counts[1] == (alone.examples, alone.compared, alone.worst_ratio)


def test_an_alarm_is_found_counted_and_reproducible(monkeypatch: pytest.MonkeyPatch) -> None:
    """A faulty layer among the honest ones stands for a suite that blames an honest one."""
    port = MUTANTS["subtracts the update"].port
    for honest in (VARIANTS, HONEST):
        monkeypatch.setitem(honest, "faulty", port)
    for seed in (0, 5):
        (finding,) = ask_unit(Unit("quick", seed, ("faulty",), ("FWD-1",)))
        assert finding.alarms
        assert f"--seed={seed} --clause=FWD-1" in reproducer(finding, finding.alarms[0])
        page = render(rows_of([finding], "f"), versions={})
        assert "there were alarms" in page
        assert reproducer(finding, finding.alarms[0]) in page


def test_allocators_are_asked_of_their_chapter_and_layers_of_theirs() -> None:
    name = "allocator: averages in fp64"
    unit = Unit("quick", 5, (name, NAMES[0]), ("RANK-1", "FWD-1"))
    allocator, layer = ask_unit(unit)
    assert (allocator.asked, layer.asked) == (2, 2)
    assert allocator.compared
    assert allocator.alarms == []


def test_a_tiny_campaign_writes_the_page_and_resumes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "tests.false_alarms.__main__.clauses", lambda: dict.fromkeys(("FWD-1", "FWD-2"))
    )
    monkeypatch.setattr(
        "tests.false_alarms.campaign.clauses", lambda: dict.fromkeys(("FWD-1", "FWD-2"))
    )
    journal, page = tmp_path / "journal.jsonl", tmp_path / "page.md"
    arguments = [
        *TINY,
        f"--journal={journal}",
        f"--page={page}",
        f"--rows={tmp_path / 'rows.json'}",
    ]
    assert main(arguments) == 0
    lines = journal.read_text().splitlines()
    assert len(lines) == 4
    assert "**No alarms** in 4 runs." in page.read_text()
    first = page.read_text()

    journal.write_text("\n".join(lines[:2]) + "\n" + lines[2][:20])  # as if it had been cut off
    assert main(arguments) == 0
    assert page.read_text() == first
    assert sum("compared" in json.loads(ln) for ln in journal.read_text().splitlines()[:2]) == 2


def test_a_campaign_of_a_few_variants_leaves_the_others_rows(tmp_path: Path) -> None:
    def row(variant: str, seeds: int, sources: str, alarms: tuple[str, ...] = ()) -> Row:
        return Row(variant, "quick", seeds, 1, 2, 3, 0.5, sources, alarms)

    old = [row(NAMES[0], 9, "old"), row(NAMES[1], 9, "old"), row("is no more", 9, "old")]
    save(merged(old, [row(NAMES[1], 4, "new", ("why",))]), tmp_path / "rows.json")
    assert load(tmp_path / "rows.json") == [
        row(NAMES[1], 4, "new", ("why",)),
        row(NAMES[0], 9, "old"),
    ]


def test_the_page_is_what_the_rows_say_and_about_these_variants() -> None:
    rows = load()
    assert (
        render(rows, versions={}).partition("## With")[0]
        == (PAGE.read_text(encoding="utf-8").partition("## With")[0])
    )
    seeds = {(row.variant, row.profile): row.seeds for row in rows}
    assert [v for v in VARIANTS if seeds.get((v, "quick"), 0) < 200] == []
    assert [v for v in VARIANTS if seeds.get((v, "standard"), 0) < 20] == []


def test_a_finding_survives_the_journal() -> None:
    finding = Finding("v", "quick", 3, 1, 2, 3, 0.5, [{"clause": "FWD-1"}])
    assert Finding(**json.loads(json.dumps(finding.as_entry()))) == finding

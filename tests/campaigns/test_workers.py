"""Work in processes of its own: results come back, failures are named, nothing leaks."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
import torch

from tests.campaigns.journal import Journal
from tests.campaigns.workers import WorkerError, forked


def _double(number: int) -> int:
    return 2 * number


def _change_the_default_dtype(number: int) -> bool:
    unchanged = torch.get_default_dtype() == torch.float32
    torch.set_default_dtype(torch.float64)
    return unchanged


def _raise(number: int) -> int:
    raise ValueError(f"no {number}")


def _die(number: int) -> int:
    os._exit(7)


def _hang(number: int) -> int:
    time.sleep(60)
    return number


def test_every_item_has_its_result() -> None:
    results = dict(forked(_double, range(5), jobs=2, timeout=60))
    assert results == {n: 2 * n for n in range(5)}


def test_one_item_does_not_poison_the_next() -> None:
    assert all(ok for _, ok in forked(_change_the_default_dtype, range(3), jobs=1, timeout=60))


@pytest.mark.parametrize(
    ("task", "says"), [(_raise, "no 3"), (_die, "died: 7"), (_hang, "more than 1 seconds")]
)
def test_a_failure_is_named(task, says) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(WorkerError, match=says):
        list(forked(task, [3], jobs=1, timeout=1 if task is _hang else 60))


def test_a_journal_keeps_what_is_whole_and_of_its_fingerprint(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "journal.jsonl"
    Journal(path, "old").append({"n": 0})
    Journal(path, "new").append({"n": 1})
    with path.open("a") as file:
        file.write('{"n": 2, "fing')
    Journal(path, "new").append({"n": 3})
    assert list(Journal(path, "new")) == [{"n": 1}, {"n": 3}]

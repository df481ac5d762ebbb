"""The measurement itself: sizes of terms, what is visible, going on where it stopped, and the page."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from conformance.case import Case
from conformance.port import Port
from conformance.values import draw
from tests.field import measure
from tests.field import study as study_module
from tests.field.batches import batch, nominal
from tests.field.campaign import ROOT, Plan, Store, run
from tests.field.measure import ALL_RULES, Batch, run_batch, verdicts
from tests.field.ours import LANES
from tests.field.page import page
from tests.field.play import play, same, untouched
from tests.field.results import Results, count
from tests.field.scene import Scene, build
from tests.field.study import study
from tests.mutants.gallery import MUTANTS
from tests.mutants.variants import VARIANTS

SOME = ("adds nothing", "the gradient of E is doubled", "leaves out the 1e-5", "merges silently")
TINY = Plan(seeds=1, random=0, kinds=("8bit",), dtypes=("bfloat16",), clauses=False, mutants=SOME)
CASE = Case("8bit", "bfloat16", 8, 5, (2, 3), (3, 2), bias=True, seed=1)


@pytest.fixture(scope="module")
def scene() -> Scene:
    built = build(CASE)
    assert built is not None
    return built


@pytest.fixture(scope="module")
def found() -> Iterator[Batch]:
    """A batch of the first probes and of dyadic cases only, and of three honest layers."""

    def few(*arguments: Any) -> list[Case]:
        cases = batch(*arguments)
        return [*cases[:3], *(case for case in cases if case.values == "dyadic")]

    names = ("folds E into B", "computes in the input's dtype", "adds in fp32 and rounds once")
    honest = {name: VARIANTS[name] for name in names}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measure, "batch", few)
        patch.setattr(measure, "honest_ports", lambda: honest)
        yield run_batch("8bit", "bfloat16", 0, 0, SOME)


def test_numerical_faults_are_visible_and_others_are_not(found: Batch) -> None:
    assert {name: tally.visible for name, tally in found.mutants.items()} == {
        "adds nothing": True,
        "the gradient of E is doubled": True,
        "leaves out the 1e-5": True,  # dA, dE and dB are fp32, and dyadic data leaves them exact
        "merges silently": False,
    }
    assert not found.mutants["merges silently"].differs


def test_both_lanes_kill_what_is_visible_and_blame_nobody(found: Batch) -> None:
    index = list(ALL_RULES).index(LANES)
    visible = [tally for tally in found.mutants.values() if tally.visible]
    assert all(tally.rejected[index] for tally in visible)
    assert sum(tally.rejected[index] for tally in found.honest.values()) == 0
    assert sum(tally.cases for tally in found.honest.values()) == 3 * found.scenes > 0


def test_every_rule_kills_a_layer_that_adds_nothing(found: Batch) -> None:
    tally = found.mutants["adds nothing"]
    used = [i for i, rule in enumerate(ALL_RULES.values()) if "bfloat16" in rule.dtypes]
    blind = [list(ALL_RULES)[i] for i in used if not tally.rejected[i]]
    # A tolerance of 1e4 sees no update that is smaller.
    assert blind in ([], ["allclose, SwiGLU's table (Liger-Kernel)"])


def test_a_batch_survives_its_file(found: Batch) -> None:
    assert Batch.from_json(json.loads(json.dumps(asdict(found)))) == found


def test_a_batch_is_the_same_every_time() -> None:
    assert batch("8bit", "float16", 3, 4) == batch("8bit", "float16", 3, 4)
    assert batch("8bit", "float16", 3, 4) != batch("8bit", "float16", 4, 4)
    assert any(nominal(case) for case in batch("4bit", "float32", 0, 0))
    assert len(batch("4bit", "float32", 0, 3)) == len(batch("4bit", "float32", 0, 0)) + 3


def test_sizes_are_those_of_the_terms(scene: Scene) -> None:
    """With all magnitudes in place of values, a sum is the sum of its terms' magnitudes."""
    for expected in scene.expected.values():
        assert expected.size.elements.shape == expected.truth.shape
        assert (np.abs(expected.truth) <= expected.size.elements * (1 + 1e-12)).all()
        largest = expected.size.one + expected.size.base_one
        assert np.abs(expected.truth.reshape(-1, expected.truth.shape[-1])).sum(0).max() <= largest
        norm = expected.size.frobenius + expected.size.base_frobenius
        assert np.linalg.norm(expected.truth) <= norm * (1 + 1e-12)


def test_the_truth_is_what_the_eager_layer_rounds(scene: Scene) -> None:
    for name, expected in scene.expected.items():
        u = 2.0**-8 if name in ("y", "dx") else 2.0**-20
        error = np.abs(expected.eager.double().numpy() - expected.truth)
        assert (error <= 4 * u * expected.size.elements).all(), name
        assert expected.low.dtype == expected.eager.dtype == expected.reference.dtype


def test_playing_leaves_torch_as_it_was() -> None:
    data = draw(CASE)
    before = torch.get_rng_state()
    for name in ("sets torch's default dtype", "leaves autocast on", "makes a graph under no_grad"):
        play(MUTANTS[name].port, CASE, data)
    assert torch.get_default_dtype() == torch.float32
    assert not torch.is_autocast_enabled("cpu")
    assert torch.equal(torch.get_rng_state(), before)


def test_a_play_that_raises_is_none_and_all_rules_reject_it(scene: Scene) -> None:
    broken = Port("broken", "0", {"8bit": _raises})
    got = play(broken, CASE, scene.data)
    assert got is None
    assert not same(got, scene.eager)
    assert not any(verdicts(scene.readings(got, "input")))


def _raises(*_: Any, **__: Any) -> torch.nn.Module:
    raise RuntimeError("no layer today")


def test_no_global_state_is_kept_by_an_error() -> None:
    def fail() -> None:
        with untouched():
            torch.set_default_dtype(torch.float64)
            raise ValueError("stop")

    with pytest.raises(ValueError, match="stop"):
        fail()
    assert torch.get_default_dtype() == torch.float32


def test_finished_pieces_are_not_measured_again(tmp_path: Path) -> None:
    calls: list[int] = []

    def measure(number: int) -> int:
        calls.append(number)
        return number * number

    tasks = [(f"piece-{n}", measure, (n,)) for n in range(3)]
    store = Store(tmp_path)
    store.put("piece-1", 1)
    assert run(tasks, store, 1, "pieces") == {"piece-0": 0, "piece-1": 1, "piece-2": 4}
    assert calls == [0, 2]
    assert run(tasks, Store(tmp_path), 1, "pieces") == {"piece-0": 0, "piece-1": 1, "piece-2": 4}
    assert calls == [0, 2]


def test_a_tiny_study_from_cases_to_page(
    tmp_path: Path, found: Batch, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same batch twice: once measured, once read back; the page holds its figures."""
    measured: list[str] = []

    def once(*_: Any) -> dict[str, Any]:
        measured.append("batch")
        return asdict(found)

    monkeypatch.setattr(study_module, "batch_json", once)
    results = study(TINY, tmp_path)
    assert study(TINY, tmp_path) == results
    assert measured == ["batch"]
    assert results.found == count([found])
    text = page(results)
    assert "| **ours: bounds and exact lane** | 3 (3), 0 alarms |" in text
    assert json.loads(json.dumps(results.to_json()))["found"]["bfloat16"]["visible"] == sorted(
        SOME[:3]
    )


def test_the_page_in_the_repository_is_that_of_its_figures() -> None:
    """docs/field.md is what `page` makes of docs/field.json: nobody has written into it."""
    given = json.loads((ROOT / "docs" / "field.json").read_text(encoding="utf-8"))
    assert page(Results.from_json(given)) == (ROOT / "docs" / "field.md").read_text(
        encoding="utf-8"
    )

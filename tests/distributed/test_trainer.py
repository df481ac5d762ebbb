"""transformers' Trainer on two processes: the callback's allocators agree, and one of them saves."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch import distributed as dist

import qsvd
from qsvd.integrations.transformers import RankAllocatorCallback
from tests.distributed.processes import run
from tests.qsvd.language import LAYERS, config, quantised, sequences, write_model

STEPS = 12


def _trained(folder: Path, out: Path, resume: bool = False) -> dict[str, Any]:
    """The Trainer's run as `torchrun` would start it; alone, it accumulates two halves."""
    rank, world = str(dist.get_rank()), dist.get_world_size()
    os.environ.update(
        RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=str(world), LOCAL_WORLD_SIZE=str(world)
    )
    os.environ.update(MASTER_ADDR="localhost", MASTER_PORT="1")  # of a group that there is already
    warnings.simplefilter("ignore")  # what transformers and accelerate deprecate of themselves
    from transformers import Trainer, TrainingArguments

    torch.manual_seed(1)
    model = qsvd.adapt(quantised(folder), config())
    callback = RankAllocatorCallback(model, config())
    arguments = TrainingArguments(
        str(out),
        max_steps=STEPS,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2 // world,
        train_sampling_strategy="sequential",
        learning_rate=5e-2,
        lr_scheduler_type="constant",
        save_strategy="steps",
        save_steps=6,
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        dataloader_pin_memory=False,
    )
    trainer = Trainer(model, arguments, train_dataset=sequences(), callbacks=[callback])
    assert arguments.world_size == world
    trainer.train(resume_from_checkpoint=str(out / "checkpoint-6") if resume else None)
    named = model.named_parameters()
    return {
        "weights": {n: p.detach().clone() for n, p in named if "lora_" in n},
        "kept": callback.allocator.rank_pattern,
    }


def _equal(one: dict[str, Tensor], two: dict[str, Tensor]) -> bool:
    return all(torch.equal(value, two[name]) for name, value in one.items())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"))


def test_two_processes_train_save_and_resume(folder: Path, tmp_path: Path) -> None:
    first, second = run(2, _trained, folder, tmp_path / "two")
    (alone,) = run(1, _trained, folder, tmp_path / "one")
    again = run(2, _trained, folder, tmp_path / "two", True)

    assert sum(sum(kept) for kept in first["kept"].values()) == 2 * LAYERS
    for other in (second, alone, *again):  # a sum of two has one order, so bit for bit
        assert other["kept"] == first["kept"]
        assert _equal(first["weights"], other["weights"])
    loaded = qsvd.load_adapter(quantised(folder), tmp_path / "two" / "checkpoint-12")
    ranks = {f"{n}.lora_E": m.r["default"] for n, m in qsvd.adapted_layers(loaded).items()}
    assert ranks == {name: sum(kept) for name, kept in first["kept"].items()}

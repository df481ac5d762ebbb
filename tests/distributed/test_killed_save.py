"""A process killed while several save together leaves the old pair of files or the new one."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import pytest
from torch import distributed as dist
from torch.nn.parallel import DistributedDataParallel

import qsvd
from tests.distributed.processes import killed
from tests.distributed.runs import Plan, adapted, sharded
from tests.qsvd.models import stack

RANKS = (2, 5)


def _save_without_end(engine: str, folder: Path) -> None:
    """Two adapters, which differ in rank and in every value, saved in turn."""
    models = []
    for rank in RANKS:
        settings = (("init_r", rank), ("target_r", rank))
        model = adapted(replace(Plan(), settings=settings))
        if engine == "fsdp2":
            sharded(model)
        models.append(model if engine == "fsdp2" else DistributedDataParallel(model))
    for number in range(10**6):
        qsvd.save_adapter(models[number % 2], folder)
        if dist.get_rank() == 0:
            (folder / "saved").write_text(str(number))


@pytest.mark.parametrize("engine", ["ddp", "fsdp2"])
@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_process_leaves_a_whole_pair(engine: str, victim: int, tmp_path: Path) -> None:
    rng = random.Random(victim)
    for attempt in range(3):
        folder = tmp_path / str(attempt)
        killed(
            2,
            victim,
            (folder / "saved").exists,
            rng.uniform(0.0, 0.2),
            _save_without_end,
            engine,
            folder,
        )

        loaded = qsvd.load_adapter(stack(depth=2), folder)

        ranks = {layer.r["default"] for layer in qsvd.adapted_layers(loaded).values()}
        assert ranks in ({RANKS[0]}, {RANKS[1]})

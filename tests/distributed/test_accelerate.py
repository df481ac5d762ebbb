"""Accelerate: a loop over `accelerator.prepare`d parts is the loop over DDP, and what it unwraps is saved."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed as dist

import qsvd
from qsvd import RankAllocator
from tests.distributed.compare import assert_close, assert_equal
from tests.distributed.processes import run
from tests.distributed.runs import (
    Outcome,
    Plan,
    adapted,
    alone,
    loss_of,
    optimizer_of,
    part,
    weights_of,
)
from tests.qsvd.models import stack

PLAN = Plan(penalty=0.1)


def _accelerator(**options: Any) -> Any:
    """As in a process that `accelerate launch` has started."""
    rank, world = str(dist.get_rank()), str(dist.get_world_size())
    os.environ.update(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=world, LOCAL_WORLD_SIZE=world)
    os.environ.update(MASTER_ADDR="localhost", MASTER_PORT="1")  # of a group that there is already
    from accelerate import Accelerator

    return Accelerator(cpu=True, **options)


def _trained(plan: Plan, folder: Path) -> tuple[Outcome, list[str]]:
    accelerator = _accelerator(gradient_accumulation_steps=plan.pieces)
    inner = adapted(plan)
    model, optimizer = accelerator.prepare(inner, optimizer_of(plan, inner))
    assert accelerator.num_processes == dist.get_world_size()
    assert model is not inner  # it is wrapped
    allocator = RankAllocator(model, plan.config)
    states = []
    for step in range(1, plan.steps + 1):
        x, wanted = part(accelerator.process_index, accelerator.num_processes, step, plan.seed)
        for x_i, wanted_i in zip(x.chunk(plan.pieces), wanted.chunk(plan.pieces), strict=True):
            with accelerator.accumulate(model):
                loss = loss_of(model, x_i, wanted_i)
                accelerator.backward(loss + plan.penalty * qsvd.orthogonal_penalty(model))
                optimizer.step()
                if accelerator.sync_gradients:
                    allocator.step(step)
                    states.append(allocator.state_dict())
                optimizer.zero_grad()
    qsvd.save_adapter(model, folder / "wrapped")
    if accelerator.is_main_process:
        qsvd.save_adapter(accelerator.unwrap_model(model), folder / "unwrapped")
    accelerator.wait_for_everyone()
    return Outcome(states, weights_of(model)), sorted(p.name for p in folder.glob("*/*"))


@pytest.mark.parametrize(("world", "pieces"), [(2, 1), (4, 1), (2, 2)])
def test_a_prepared_loop_is_ddps(world: int, pieces: int, tmp_path: Path) -> None:
    plan = replace(PLAN, pieces=pieces, optimizer="adamw" if world * pieces == 2 else "sgd")

    ran = run(world, _trained, plan, tmp_path)

    outcomes = [outcome for outcome, _ in ran]
    for other in outcomes[1:]:
        assert_equal(outcomes[0], other)
    if world * pieces == 2:
        assert_equal(outcomes[0], alone(replace(plan, pieces=2)))
    else:
        assert_close(outcomes[0], replace(plan, pieces=1))
    assert [len(files) for _, files in ran] == [4] * world
    loaded = [
        weights_of(qsvd.load_adapter(stack(depth=2), tmp_path / name))
        for name in ("wrapped", "unwrapped")
    ]
    assert all(torch.equal(w, loaded[1][n]) for n, w in loaded[0].items())

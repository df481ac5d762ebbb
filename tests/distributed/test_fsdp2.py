"""FSDP2 (`fully_shard`): shards of adapters are allocated, penalised and saved as whole ones would be."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch import distributed as dist
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor.debug import CommDebugMode

import qsvd
from qsvd import RankAllocator, _gathering
from qsvd._distributed import is_shard, local
from qsvd._gathering import whole
from tests.distributed import runs
from tests.distributed.compare import assert_close, assert_equal
from tests.distributed.processes import run
from tests.distributed.runs import (
    Plan,
    adapted,
    alone,
    fsdp2,
    loss_of,
    part,
    save_with_empty_layers,
    sharded,
)
from tests.qsvd.build import Kind
from tests.qsvd.models import stack

PLAN = Plan(penalty=0.1)
UNEVEN = (("init_r", 5),)  # over four processes: 2, 2, 1 and no rows of A


@pytest.mark.parametrize(
    ("world", "kind", "options"),
    [
        (2, "4bit", {}),
        (2, "8bit", {"keep_whole": True}),
        (2, "4bit", {"columns": True}),
        (4, "4bit", {"blocks": False}),
        (4, "4bit", {"hybrid": True}),
    ],
    ids=["2 processes", "8bit", "A split the other way", "4 processes, one piece", "2 by 2"],
)
def test_every_process_ends_as_one_with_the_whole_batch(
    world: int, kind: Kind, options: dict[str, Any]
) -> None:
    settings = () if options.get("columns") else UNEVEN
    plan = replace(PLAN, kind=kind, optimizer="sgd", settings=settings)

    outcomes = run(world, fsdp2, plan, options)

    for other in outcomes[1:]:
        assert_equal(outcomes[0], other)
    assert_close(outcomes[0], plan)


@pytest.mark.parametrize(
    ("penalty", "options"),
    [(0.0, {}), (0.1, {"blocks": False}), (0.1, {"reshard_after_forward": False})],
    ids=["no penalty", "one piece", "kept after forward"],
)
def test_two_processes_are_one_that_accumulates_bit_for_bit(
    penalty: float, options: dict[str, Any]
) -> None:
    """But for the penalty of resharded weights, whose gradient is added after the averaging."""
    plan = replace(PLAN, penalty=penalty)
    for other in run(2, fsdp2, plan, options, penalty > 0):
        assert_equal(alone(replace(plan, pieces=2)), other)


def _penalty_gradients() -> tuple[Tensor, dict[str, Tensor]]:
    model = adapted(PLAN)
    sharded(model)
    penalty = qsvd.orthogonal_penalty(model)
    penalty.backward()
    return penalty.detach(), _gradients(model)


def _gradients(model: torch.nn.Module) -> dict[str, Tensor]:
    layers = qsvd.adapted_layers(model).items()
    held = {f"{n}.{p}": getattr(m, p)["default"].grad for n, m in layers for p in runs.PARTS}
    held = {name: gradient for name, gradient in held.items() if gradient is not None}
    return dict(zip(held, whole(list(held.values())), strict=True))


def test_the_penalty_of_shards_is_the_penalty_of_the_weights() -> None:
    model = adapted(PLAN)
    expected = qsvd.orthogonal_penalty(model)
    expected.backward()
    for penalty, gradients in run(4, _penalty_gradients):
        assert torch.equal(penalty, expected)
        for name, gradient in _gradients(model).items():
            assert torch.equal(gradients[name], gradient), name


def _overflowing_in_one_shard() -> tuple[dict[str, Any], dict[str, Any]]:
    model = adapted(PLAN)
    sharded(model)
    allocator = RankAllocator(model, PLAN.config)
    loss_of(model, *part(dist.get_rank(), 2, 1)).backward()
    allocator.step(0)
    before = allocator.state_dict()
    if dist.get_rank() == 1:
        weight = qsvd.adapted_layers(model)["layers.0.v_proj"].lora_B["default"]
        local(weight.grad)[0, 0] = float("inf")
    allocator.step(0)
    return before, allocator.state_dict()


def test_an_overflow_in_one_shard_is_a_step_for_none() -> None:
    for before, after in run(2, _overflowing_in_one_shard):
        for average in ("means", "uncertainties"):
            for key, value in before[average].items():
                assert torch.equal(value, after[average][key])


def _exchanges(depth: int) -> dict[str, int]:
    """What a step that allocates asks of the others, by kind."""
    model = qsvd.adapt(stack(depth=depth), PLAN.config)
    sharded(model)
    allocator = RankAllocator(model, PLAN.config)
    loss_of(model, *part(dist.get_rank(), 2, 1)).backward()
    with CommDebugMode() as counted:
        allocator.step(4)
    return {str(kind).rpartition(".")[2]: n for kind, n in counted.get_comm_counts().items()}


def test_an_allocation_takes_three_exchanges_however_many_layers_there_are() -> None:
    """Is every gradient finite; all importances; the choice."""
    for depth in (1, 3):
        counts = run(2, _exchanges, depth)[0]
        assert sorted(counts.values()) == [1, 1, 1], counts


def _loaded_before_sharding(state: dict[str, Any], together: int) -> list[dict[str, Any]]:
    """Go on with another run's averages: loaded, then sharded; or sharded, then loaded."""
    _gathering._TOGETHER = together
    states = []
    for early in (True, False):
        model = adapted(PLAN)
        allocator = RankAllocator(model, PLAN.config)
        if early:
            allocator.load_state_dict(state)
        sharded(model)
        if not early:
            allocator.load_state_dict(state)
        allocator.step(4)  # no gradients: only what was loaded counts
        states.append(allocator.state_dict())
        loss_of(
            model, *part(0, 1, 5)
        ).backward()  # the whole batch on each: averaging changes nothing
        allocator.step(5)
        states.append(allocator.state_dict())
    return states


@pytest.mark.parametrize("together", [2**24, 100], ids=["one exchange", "many"])
def test_a_state_is_loaded_before_sharding_or_after(together: int) -> None:
    model = adapted(PLAN)
    allocator = RankAllocator(model, PLAN.config)
    loss_of(model, *part(0, 1, 1)).backward()
    allocator.step(0)
    state = allocator.state_dict()
    model.zero_grad()
    expected = []
    for step in (4, 5):
        allocator.step(step)
        expected.append(allocator.state_dict())
        loss_of(model, *part(0, 1, 5)).backward()

    for states in run(2, _loaded_before_sharding, state, together):
        for got, wanted in zip(states, expected * 2, strict=True):
            assert got["rank_pattern"] == wanted["rank_pattern"]
            assert got["budget"] == wanted["budget"]
            for average in ("means", "uncertainties"):
                for key, value in wanted[average].items():
                    assert torch.equal(got[average][key], value), key


def _pruned_to_nothing(folder: Path) -> tuple[dict[str, int], dict[str, Tensor]]:
    """Go on training an adapter of which some layers have no triplet left, and no row to shard."""
    model = qsvd.load_adapter(stack(depth=2), folder, trainable=True)
    sharded(model)
    allocator = RankAllocator(model, PLAN.config)
    loss = loss_of(model, *part(dist.get_rank(), 2, 1)) + qsvd.orthogonal_penalty(model)
    loss.backward()
    allocator.step(0)
    allocator.step(6)
    qsvd.save_adapter(model, folder / "again")
    return allocator.ranks, runs.weights_of(model)


def test_layers_without_a_triplet_are_sharded_too(tmp_path: Path) -> None:
    ranks = save_with_empty_layers(PLAN, tmp_path)

    one, two = run(2, _pruned_to_nothing, tmp_path)

    assert one[0] == two[0] == ranks
    assert list(one[0].values()) == [0, 0, 4, 4]
    loaded = runs.weights_of(qsvd.load_adapter(stack(depth=2), tmp_path / "again"))
    assert all(torch.equal(weight, one[1][name]) for name, weight in loaded.items())


def _saved_after_an_evaluation(folder: Path) -> tuple[bool, list[str], dict[str, Tensor]]:
    """An evaluation leaves whole copies of the root's weights in place of its shards."""
    model = adapted(PLAN)
    sharded(model, blocks=False)
    allocator = RankAllocator(model, PLAN.config)
    loss_of(model, *part(dist.get_rank(), 2, 1)).backward()
    allocator.step(0)
    with torch.no_grad():
        model(part(0, 1, 1)[0])
    copies = not is_shard(qsvd.adapted_layers(model)["layers.0.v_proj"].lora_E["default"])
    allocator.step(6)
    with torch.no_grad():
        model(part(0, 1, 1)[0])
    qsvd.save_adapter(model, folder, prune=False)
    return copies, sorted(os.listdir(folder)), runs.weights_of(model)


def test_an_evaluation_between_is_nothing_to_the_allocator_nor_to_saving(tmp_path: Path) -> None:
    one, two = run(2, _saved_after_an_evaluation, tmp_path / "new")

    assert one[0]  # sanity check: the evaluation did what it is here for
    assert one[1] == two[1] == ["adapter_config.json", "adapter_model.safetensors"]
    loaded = runs.weights_of(qsvd.load_adapter(stack(depth=2), tmp_path / "new"))
    for name, weight in one[2].items():
        assert torch.equal(weight, loaded[name])
    assert sum(int(w.count_nonzero()) for n, w in loaded.items() if "lora_E" in n) == 8


def _refused(folder: Path) -> list[str]:
    base, model = stack(depth=2), adapted(PLAN)
    sharded(base)
    sharded(model)
    said = []
    for attempt in (
        lambda: qsvd.adapt(base, PLAN.config),
        lambda: qsvd.load_adapter(base, folder),
        lambda: qsvd.load_adapter(model, folder, "second"),
    ):
        with pytest.raises(ValueError, match="sharded by `fully_shard` already") as caught:
            attempt()
        said.append(str(caught.value))
    return said


def test_new_parameters_in_a_sharded_model_are_refused(tmp_path: Path) -> None:
    qsvd.save_adapter(adapted(PLAN), tmp_path)
    assert len(run(1, _refused, tmp_path)[0]) == 3


def test_fsdp1_is_refused(tmp_path: Path) -> None:
    model = FullyShardedDataParallel.__new__(FullyShardedDataParallel)  # the real one needs a GPU
    torch.nn.Module.__init__(model)
    for attempt in (
        lambda: RankAllocator(model, PLAN.config),
        lambda: qsvd.adapt(model, PLAN.config),
        lambda: qsvd.save_adapter(model, tmp_path),
    ):
        with pytest.raises(TypeError, match="flattens parameters"):
            attempt()

"""DistributedDataParallel: all processes choose alike, and as one process with the whole batch would."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import qsvd
from qsvd import RankAllocator
from tests.distributed import runs
from tests.distributed.compare import assert_close, assert_equal
from tests.distributed.processes import run
from tests.distributed.runs import (
    Outcome,
    Plan,
    adapted,
    alone,
    ddp,
    loss_of,
    optimizer_of,
    part,
    save_with_empty_layers,
    train,
)
from tests.qsvd.build import KINDS, Kind
from tests.qsvd.models import stack

PLAN = Plan(penalty=0.1)


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("kind", KINDS)
def test_every_process_ends_as_one_with_the_whole_batch(kind: Kind, world: int) -> None:
    plan = replace(PLAN, kind=kind, optimizer="sgd")

    outcomes = run(world, ddp, plan)

    for other in outcomes[1:]:
        assert_equal(outcomes[0], other)
    assert_close(outcomes[0], plan)


@pytest.mark.parametrize("given", ["wrapped", "inner"])
def test_two_processes_are_one_that_accumulates_bit_for_bit(given: str) -> None:
    """A sum of two has one order, so here the same is the same, with AdamW too."""
    for other in run(2, ddp, PLAN, given):
        assert_equal(alone(replace(PLAN, pieces=2)), other)


@pytest.mark.parametrize(
    "options",
    [{"find_unused_parameters": True}, {"static_graph": True}, {"gradient_as_bucket_view": True}],
    ids=lambda options: next(iter(options)),
)
def test_ddps_options_change_nothing(options: dict[str, Any]) -> None:
    for other in run(2, ddp, PLAN, "wrapped", options):
        assert_equal(alone(replace(PLAN, pieces=2)), other)


def _apart() -> Outcome:
    """The run of a process that never talks to the others."""
    model = adapted(PLAN)
    allocator = RankAllocator(model, PLAN.config)
    optimizer = optimizer_of(replace(PLAN, optimizer="sgd"), model)
    return train(PLAN, model, allocator, optimizer, range(1, 9), dist.get_rank(), 2)


def test_processes_that_do_not_talk_are_told_apart() -> None:
    """The comparisons above would notice."""
    one, two = run(2, _apart)
    with pytest.raises(AssertionError):
        assert_equal(one, two)
    with pytest.raises(AssertionError, match="is off by"):
        assert_close(one, replace(PLAN, optimizer="sgd"), choices=False)


def test_accumulated_gradients_are_exchanged_once() -> None:
    plan = replace(PLAN, optimizer="sgd", pieces=2)
    one, two = run(2, ddp, plan)
    assert_equal(one, two)
    assert_close(one, replace(plan, pieces=1))


def _rounding_otherwise() -> tuple[Any, Any]:
    model = DistributedDataParallel(adapted(PLAN))
    allocator = RankAllocator(model, PLAN.config)
    loss_of(model, *part(dist.get_rank(), 2, 1)).backward()
    allocator.step(0)
    if dist.get_rank():  # far more than hardware would: it would choose the opposite
        for mean in allocator._means.values():
            mean.reciprocal_()
    allocator.step(4)
    return allocator.rank_pattern, [w == 0 for n, w in runs.weights_of(model).items() if "E" in n]


def test_the_first_process_decides_where_hardware_differs() -> None:
    one, two = run(2, _rounding_otherwise)
    assert one[0] == two[0]
    assert all(torch.equal(a, b) for a, b in zip(one[1], two[1], strict=True))
    assert sum(sum(kept) for kept in one[0].values()) == 8


def _overflowing() -> dict[str, Any]:
    """Under a loss scale, one process' loss overflows once."""
    model = DistributedDataParallel(adapted(PLAN))
    allocator = RankAllocator(model, PLAN.config)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for step in (1, 2, 3):
        loss = loss_of(model, *part(dist.get_rank(), 2, step))
        if step == 2 and dist.get_rank() == 1:
            loss = loss * float("inf")
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        allocator.step(0, grad_scale=scaler.get_scale())
        scaler.update()
        optimizer.zero_grad()
    return {**allocator.state_dict(), "scale": scaler.get_scale()}


def test_an_overflow_on_one_process_is_a_step_for_none() -> None:
    one, two = run(2, _overflowing)
    assert one["scale"] == two["scale"] == 2.0**9
    for average in ("means", "uncertainties"):
        for key, value in one[average].items():
            assert value.isfinite().all()
            assert value.any()
            assert torch.equal(value, two[average][key])


def _saved(folder: Path, wrapped: bool) -> list[str]:
    """Save, and say what was there as soon as this process had saved."""
    model: nn.Module = adapted(PLAN)
    if wrapped:
        model = DistributedDataParallel(model)
        qsvd.save_adapter(model, folder)
    elif dist.get_rank() == 0:
        qsvd.save_adapter(model, folder)
    return sorted(os.listdir(folder)) if folder.exists() else []


@pytest.mark.parametrize("wrapped", [True, False])
def test_an_adapter_is_saved_once_and_loaded_anywhere(wrapped: bool, tmp_path: Path) -> None:
    listed = run(2, _saved, tmp_path / "new", wrapped)

    files = ["adapter_config.json", "adapter_model.safetensors"]
    assert listed[0] == files
    assert listed[1] == files or not wrapped
    loaded = qsvd.load_adapter(stack(depth=2), tmp_path / "new")
    expected = runs.weights_of(adapted(PLAN))
    assert all(torch.equal(w, expected[n]) for n, w in runs.weights_of(loaded).items())


def _unwritable(folder: Path) -> str:
    try:
        qsvd.save_adapter(DistributedDataParallel(adapted(PLAN)), folder / "file" / "below")
    except (OSError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return "saved"


def test_a_failed_save_fails_everywhere(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    first, second = run(2, _unwritable, tmp_path)
    assert first.startswith("NotADirectoryError")
    assert second.startswith("RuntimeError: The first process failed: NotADirectoryError")


class _Checkpointed(nn.Module):
    """The model, the activations of its blocks computed again in the backward pass."""

    def __init__(self, model: nn.Module, reentrant: bool) -> None:
        super().__init__()
        self.model, self.reentrant = model, reentrant

    def forward(self, x: Tensor) -> Tensor:
        x = x.requires_grad_(True)
        for block in self.model.layers:
            x = checkpoint(block, x, use_reentrant=self.reentrant)
        return self.model.lm_head(x)


def _checkpointed(reentrant: bool, options: dict[str, Any]) -> Outcome:
    inner = adapted(PLAN)
    model = DistributedDataParallel(_Checkpointed(inner, reentrant), **options)
    allocator, optimizer = RankAllocator(inner, PLAN.config), optimizer_of(PLAN, inner)
    outcome = train(PLAN, model, allocator, optimizer, range(1, 9), dist.get_rank(), 2)
    return replace(outcome, weights=runs.weights_of(inner))


@pytest.mark.parametrize(("reentrant", "options"), [(False, {}), (True, {"static_graph": True})])
def test_checkpointed_activations_change_nothing(reentrant: bool, options: dict[str, Any]) -> None:
    for other in run(2, _checkpointed, reentrant, options):
        assert_equal(alone(replace(PLAN, pieces=2)), other)


def _pruned_to_nothing(folder: Path, penalty: float) -> dict[str, Any]:
    """Go on training an adapter of which some layers have no triplet left."""
    model = qsvd.load_adapter(stack(depth=2), folder, trainable=True)
    parallel = DistributedDataParallel(model)
    for step in (1, 2):
        loss = loss_of(parallel, *part(dist.get_rank(), 2, step))
        (loss + penalty * qsvd.orthogonal_penalty(parallel)).backward()
    layers = qsvd.adapted_layers(model)
    return {name: layer.lora_E["default"].grad for name, layer in layers.items()}


def test_layers_without_a_triplet_do_not_stop_ddp(tmp_path: Path) -> None:
    ranks = save_with_empty_layers(PLAN, tmp_path)
    assert list(ranks.values()) == [0, 0, 4, 4]

    one, two = run(2, _pruned_to_nothing, tmp_path, 0.1)

    assert [g is None for g in one.values()] == [True, True, False, False]
    assert all(g is None or torch.equal(g, two[n]) for n, g in one.items())


def _refused(folder: Path) -> list[str]:
    plain, mine = stack(depth=2), adapted(PLAN)
    # DDP refuses a model in which nothing is trained.
    plain.layers[0].norm.requires_grad_(True)
    base, model = DistributedDataParallel(plain), DistributedDataParallel(mine)
    said = []
    for attempt in (
        lambda: qsvd.adapt(base, PLAN.config),
        lambda: qsvd.load_adapter(base, folder),
        lambda: qsvd.load_adapter(model, folder, "second"),
    ):
        with pytest.raises(
            ValueError, match="wrapped in DistributedDataParallel already"
        ) as caught:
            attempt()
        said.append(str(caught.value))
    assert qsvd.adapted_layers(base) == {}
    assert list(qsvd.adapted_layers(model)) == list(qsvd.adapted_layers(mine))
    return said


def test_new_parameters_in_a_wrapped_model_are_refused(tmp_path: Path) -> None:
    qsvd.save_adapter(adapted(PLAN), tmp_path)
    said = run(1, _refused, tmp_path)[0]
    assert said[0].endswith("which does not know of new parameters: adapt it first.")
    assert said[1].endswith("load the adapter first.")

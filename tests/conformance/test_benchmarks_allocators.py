"""The allocators' benchmark, on two small layers, and what it counts as an allocator's state."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from conformance.benchmarks.allocators import (
    PARTS,
    allocators_of,
    measure_allocators,
    state_bytes,
)
from conformance.benchmarks.limit import Rates
from conformance.benchmarks.measuring import Patience
from tests.conformance.command import PORTS

CPU = torch.device("cpu")


def test_state_is_what_is_found_in_an_allocators_attributes_and_is_not_the_models() -> None:
    model = nn.Linear(4, 5, bias=False)
    model.weight.grad = torch.zeros(5, 4)
    mean = torch.zeros(100)
    allocator = SimpleNamespace(
        model=model,
        averages={"a": mean, "b": [mean.view(10, 10), torch.zeros(3)]},
        inner=SimpleNamespace(gradient=model.weight.grad, weight=model.weight.detach()),
        name="default",
    )
    allocator.itself = allocator

    assert state_bytes(allocator, model) == 4 * (100 + 3)


def test_allocators_are_measured_in_turns_over_the_same_adapters() -> None:
    entered = allocators_of(["qsvd"])
    record, times = measure_allocators(
        entered, Rates(CPU), Patience(0.0, 3), blocks=2, shapes=((64, 64), (64, 96))
    )

    assert [e.contestant for e in record.entries] == ["qsvd", "PEFT AdaLoRA"]
    assert (record.adapters, record.rank, record.rounds) == (4, 12, 3)
    assert set(times) == set(PARTS)
    ours, peft = record.entries
    assert ours.step_over["PEFT AdaLoRA"] == pytest.approx(ours.step_seconds / peft.step_seconds)
    # Two averages of 12 ranks: 4 layers' A and E, 2 narrow and 2 wide B.
    weights = 4 * 12 * (64 + 1) + 2 * 12 * (64 + 96)
    assert ours.state_bytes in (2 * 4 * weights, 2 * 4 * weights + 4 * 12)  # and which were kept
    assert peft.state_bytes == 3 * 4 * weights


def test_a_port_without_an_allocator_is_not_entered() -> None:
    assert [a.name for a in allocators_of([str(PORTS / "honest_port.py")])] == ["PEFT AdaLoRA"]

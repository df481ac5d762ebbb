"""The stacks' benchmark, on a few small layers: what is between them decides what is there anyway."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn

from conformance.benchmarks.contestants import Contestant, base_alone, of_peft, of_port
from conformance.benchmarks.grid import Scenario
from conformance.benchmarks.results import StackRecord
from conformance.benchmarks.stacks import BETWEEN, measure_stack, stack_scenario
from conformance.port import load_port

CPU = torch.device("cpu")
SMALL = Scenario(tokens=256, in_features=256, out_features=256, rank=4)
ACTIVATION = 256 * 256 * 2


def measured(between: str, *more: Contestant) -> StackRecord:
    entered = [base_alone("0"), of_port(load_port("qsvd"), "qsvd"), *of_peft()[0], *more]
    return measure_stack(between, entered, CPU, scenario=SMALL, layers=6)


def test_an_input_that_is_kept_anyway_costs_nothing() -> None:
    record = measured("ReLU")
    base, ours, peft, lora = (e.peak_bytes for e in record.entries)

    assert base >= 6 * ACTIVATION
    assert base <= ours < base + ACTIVATION / 2
    assert min(peft, lora) > 2 * base
    assert record.entries[1].peak_over["base"] == ours / base
    assert (record.layers, record.between, record.left_out) == (6, "ReLU", {})


def test_any_other_input_is_kept_by_the_adapter() -> None:
    """
    Six of them, where the base layers keep as many of GELU's, or with nothing between them none.
    """
    for between, kept in (("GELU", 6), ("nothing", 0)):
        base, ours, *_ = (e.peak_bytes for e in measured(between).entries)

        assert (kept - 1) * ACTIVATION < base < (kept + 5) * ACTIVATION
        assert 4 * ACTIVATION < ours - base < 6.5 * ACTIVATION


def test_gradients_of_parameters_are_not_counted() -> None:
    """
    Here they would be larger than everything else.
    """
    few = replace(SMALL, tokens=8, rank=64)
    entered = [base_alone("0"), of_port(load_port("qsvd"), "qsvd")]
    _, ours = measure_stack("ReLU", entered, CPU, scenario=few, layers=6).entries

    assert ours.peak_bytes < 6 * 64 * (256 + 256) * 4


def test_what_cannot_be_built_or_run_is_left_out_with_its_reason() -> None:
    def build(base: nn.Module, scenario: Scenario) -> nn.Module:
        raise RuntimeError("no room\nfor more")

    record = measured(
        "ReLU",
        Contestant("broken", "port", "0", build),
        Contestant("other", "port", "0", build, lambda scenario: False),
    )

    assert record.left_out == {"broken": "RuntimeError: no room", "other": "not provided"}
    assert len(record.entries) == 4


def test_a_gpu_is_given_a_large_models_layers() -> None:
    assert stack_scenario(CPU).in_features == 1024
    assert stack_scenario(torch.device("cuda")).tokens == 8192
    assert set(BETWEEN) == {"ReLU", "GELU", "nothing"}

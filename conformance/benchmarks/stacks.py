"""Stacks of layers: the most that a step of training holds at once, over what the bare base layers hold.

A frozen layer keeps nothing of its input, but what trains A must. So it depends on what is between the
layers whether an adapter's input is there anyway: ReLU keeps its output, which is the next layer's input;
GELU keeps its input instead, and no function at all keeps nothing.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
from torch import nn

from conformance.benchmarks.contestants import Contestant, make_base, twin
from conformance.benchmarks.grid import Scenario
from conformance.benchmarks.measuring import NOT_PROVIDED, reason
from conformance.benchmarks.memory import peak_bytes
from conformance.benchmarks.results import StackEntry, StackRecord

LAYERS = 32
BETWEEN: dict[str, type[nn.Module]] = {"ReLU": nn.ReLU, "GELU": nn.GELU, "nothing": nn.Identity}


def stack_scenario(device: torch.device) -> Scenario:
    """One layer of the stack: of a large model's size where that is quick."""
    if device.type == "cpu":
        return Scenario(tokens=2048)
    return Scenario(tokens=8192, in_features=4096, out_features=4096)


def measure_stack(
    between: str,
    entered: Sequence[Contestant],
    device: torch.device,
    *,
    scenario: Scenario | None = None,
    layers: int = LAYERS,
) -> StackRecord:
    """The peak of each contestant's stack; one that cannot be built or run is left out, with the reason.

    Gradients of parameters exist before the step, which adds to them: they are no activations.

    Args:
        between: a name in `BETWEEN`.
        entered: the base layer first.
        device: where.
        scenario: of one layer, as wide as it is deep; `stack_scenario`'s if there is none.
        layers: how many.
    """
    scenario = scenario or stack_scenario(device)
    base = make_base(scenario, device)
    peaks: dict[str, int] = {}
    left_out: dict[str, str] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for contestant in entered:
            if not contestant.provides(scenario):
                left_out[contestant.name] = NOT_PROVIDED
                continue
            try:
                peaks[contestant.name] = _peak(
                    contestant, base, scenario, BETWEEN[between], layers, device
                )
            except Exception as error:  # a contestant's error is its own, and is told
                left_out[contestant.name] = reason(error)
    entries = [
        StackEntry(
            contestant=c.name,
            role=c.role,
            version=c.version,
            peak_bytes=peaks[c.name],
            peak_over={o: peaks[c.name] / peak for o, peak in peaks.items() if o != c.name},
        )
        for c in entered
        if c.name in peaks
    ]
    return StackRecord(scenario, layers, between, tuple(entries), left_out)


def _peak(
    contestant: Contestant,
    base: nn.Module,
    scenario: Scenario,
    between: type[nn.Module],
    layers: int,
    device: torch.device,
) -> int:
    modules: list[nn.Module] = []
    for _ in range(layers):
        layer = contestant.build(twin(base), scenario).to(device).train()
        modules += [layer, between()]
    stack = nn.Sequential(*modules)
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(scenario.tokens, scenario.in_features, generator=generator)
    x = x.to(device, scenario.x_dtype).requires_grad_(True)  # as if a layer were before it

    def step() -> None:
        stack(x).sum().backward()

    step()  # gradients are made, and what is built at the first call
    return peak_bytes(step, device)

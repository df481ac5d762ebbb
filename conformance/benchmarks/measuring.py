"""One scenario, measured: every contestant's layer built, run in turns, and its memory counted."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from conformance.benchmarks.contestants import FULL, Contestant, beside_unmasked, build, make_base
from conformance.benchmarks.grid import Scenario
from conformance.benchmarks.limit import Rates, least_work
from conformance.benchmarks.memory import peak_bytes, saved_bytes
from conformance.benchmarks.results import Entry, Record
from conformance.benchmarks.timing import (
    calls_for,
    interleaved,
    median,
    quartiles,
    ratio_of_overheads,
)


@dataclass(frozen=True)
class Patience:
    """How long a scenario is measured: so many seconds, but at least so many rounds."""

    seconds: float = 4.0
    least_rounds: int = 9


class Subject:
    """A contestant's layer with its input, ready to be run."""

    def __init__(self, layer: nn.Module, scenario: Scenario, device: torch.device) -> None:
        generator = torch.Generator().manual_seed(2)
        shapes = ((scenario.tokens, scenario.in_features), (scenario.tokens, scenario.out_features))
        x, dy = (torch.randn(shape, generator=generator) for shape in shapes)
        self.layer = layer
        self.scenario = scenario
        self.device = device
        self.x = x.to(device, scenario.x_dtype)
        self.dy = dy.to(device)
        self._trained = [p for p in layer.parameters() if p.requires_grad]

    def step(self) -> None:
        """Forward and backward in training, or an evaluation without a graph."""
        if self.scenario.mode == "forward":
            with torch.no_grad():
                self.forward(self.x)
            return
        y = self.forward(self.leaf())
        if self.dy.dtype != y.dtype:
            self.dy = self.dy.to(y.dtype)
        y.backward(self.dy)
        for p in self._trained:
            p.grad = None

    def forward(self, x: Tensor) -> Tensor:
        with self._autocast():
            if self.scenario.checkpoint:
                y: Tensor = checkpoint(self.layer, x, use_reentrant=False)
            else:
                y = self.layer(x)
        return y

    def leaf(self) -> Tensor:
        """The input, as a tensor that backward gives a gradient: in a model it is another layer's output."""
        return self.x.detach().requires_grad_(True)

    def saved_bytes(self) -> int | None:
        """Beyond what is there anyway; None where there is no graph."""
        if self.scenario.mode == "forward":
            return None
        leaf = self.leaf()
        return saved_bytes(lambda: self.forward(leaf), [leaf, *_held_by(self.layer)])

    def _autocast(self) -> AbstractContextManager[Any]:
        if self.scenario.dtype != "autocast":
            return nullcontext()
        return torch.autocast(self.device.type, dtype=self.scenario.product_dtype)


def measure(
    scenario: Scenario,
    contestants: Sequence[Contestant],
    rates: Rates,
    patience: Patience,
) -> Record:
    """What each contestant takes and keeps; one that cannot be built or run is left out, with the reason.

    Args:
        scenario: what is run.
        contestants: the base layer first.
        rates: of the machine, for the limit; its clock is the one that is used.
        patience: how long.
    """
    left_out: dict[str, str] = {}
    if (needed := _memory_needed(scenario)) > _memory_free(rates.device):
        reason = f"needs about {needed / 2**30:.1f} GiB"
        return _record(scenario, {}, {}, {}, rates, 0, {c.name: reason for c in contestants})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what libraries say to their users is not measured here
        subjects = _subjects(scenario, contestants, rates.device, left_out)
        base = subjects.get("base")
        if base is None:
            return _record(scenario, {}, {}, {}, rates, 0, left_out)
        calls = calls_for(base.step, rates.device, rates.clock)
        times = interleaved(
            {name: subject.step for name, subject in subjects.items()},
            seconds=patience.seconds,
            least_rounds=patience.least_rounds,
            device=rates.device,
            calls=calls,
            clock=rates.clock,
        )
        memory = {
            name: (subject.saved_bytes(), peak_bytes(subject.step, rates.device))
            for name, subject in subjects.items()
        }
    by_name = {c.name: c for c in beside_unmasked(contestants)}
    return _record(scenario, by_name, times, memory, rates, calls, left_out)


def _subjects(
    scenario: Scenario,
    contestants: Sequence[Contestant],
    device: torch.device,
    left_out: dict[str, str],
) -> dict[str, Subject]:
    """Those that run: each has done one step."""
    entered = beside_unmasked(contestants) if scenario.masked else contestants
    base = make_base(scenario, device)
    subjects: dict[str, Subject] = {}
    for contestant in entered:
        if not contestant.provides(scenario):
            left_out[contestant.name] = "not provided"
            continue
        try:
            layer = build(contestant, base, scenario)
            subject = Subject(layer.to(device), scenario, device)
            subject.step()
        except Exception as error:  # a contestant's error is its own, and is told
            first = str(error).partition("\n")[0]
            left_out[contestant.name] = f"{type(error).__name__}: {first}"
            continue
        subjects[contestant.name] = subject
    return subjects


def _record(
    scenario: Scenario,
    contestants: dict[str, Contestant],
    times: dict[str, list[float]],
    memory: dict[str, tuple[int | None, int]],
    rates: Rates,
    calls: int,
    left_out: dict[str, str],
) -> Record:
    work = least_work(scenario)
    limit = rates.seconds(work, scenario.product_dtype) if times else 0.0
    base = times.get("base", [])
    entries = []
    for name, taken in times.items():
        others = [other for other in times if _is_compared(name, other, contestants)]
        entries.append(
            Entry(
                contestant=name,
                role=contestants[name].role,
                version=contestants[name].version,
                seconds=median(taken),
                quartiles=quartiles(taken),
                time_over_base=median(taken) / median(base),
                overhead_over={
                    other: ratio_of_overheads(taken, times[other], base) for other in others
                },
                saved_bytes=memory[name][0],
                peak_bytes=memory[name][1],
                share_of_limit=(median(base) + (limit if name != "base" else 0.0)) / median(taken),
            )
        )
    return Record(
        scenario=scenario,
        rounds=len(base),
        calls=calls,
        limit_bytes=work.bytes,
        limit_flops=work.flops,
        limit_seconds=limit,
        entries=tuple(entries),
        left_out=left_out,
    )


def _is_compared(name: str, other: str, contestants: dict[str, Contestant]) -> bool:
    """With PEFT's layers, and a masked layer with itself in full."""
    if "base" in (name, other) or name == other:
        return False
    if other == f"{name} {FULL}":
        return True
    return contestants[other].role in ("adalora", "lora") and not other.endswith(FULL)


def _held_by(layer: nn.Module) -> list[Tensor]:
    """Parameters and buffers, and what bitsandbytes keeps beside them."""
    held: list[Tensor] = [*layer.parameters(), *layer.buffers()]
    for module in layer.modules():
        keepers = (getattr(module, "state", None), getattr(module, "quant_state", None))
        for keeper in keepers:
            held += [t for t in vars(keeper).values() if isinstance(t, Tensor)] if keeper else []
    for parameter in layer.parameters():
        state = getattr(parameter, "quant_state", None)
        held += [t for t in vars(state).values() if isinstance(t, Tensor)] if state else []
    return held


def _memory_needed(s: Scenario) -> int:
    """A generous guess: fp32 weights while they are quantised, and a dozen fp32 copies of x and y."""
    return 4 * (3 * s.in_features * s.out_features + 12 * s.tokens * (s.in_features + s.out_features))


def _memory_free(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError):  # not told on every system
        return 2**63



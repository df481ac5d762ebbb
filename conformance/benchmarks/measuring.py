"""One scenario, measured: every contestant's layer built, run in turns, and its memory counted."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from conformance.benchmarks.contestants import FULL, Contestant, build, make_base, with_others
from conformance.benchmarks.grid import Scenario
from conformance.benchmarks.limit import Rates, least_work
from conformance.benchmarks.memory import peak_bytes, saved_bytes
from conformance.benchmarks.results import Entry, Record
from conformance.benchmarks.stages import Operation, stages, traced
from conformance.benchmarks.timing import (
    calls_for,
    interleaved,
    median,
    quartiles,
    ratio_of_overheads,
    wait,
)

# Why a contestant is left out that has no such layer; all other reasons are errors.
NOT_PROVIDED = "not provided"


@dataclass(frozen=True)
class Patience:
    """How long a scenario is measured: so many seconds, but at least so many rounds."""

    seconds: float = 4.0
    least_rounds: int = 9


@dataclass(frozen=True)
class Measured:
    """A scenario's record, the seconds behind it by contestant, and who raised an error."""

    record: Record
    times: Mapping[str, list[float]]
    failed: frozenset[str]


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
        y: Any = self.forward(self.leaf())
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
) -> Measured:
    """What each contestant takes and keeps; one that cannot be built or run is left out, with the reason.

    Args:
        scenario: what is run.
        contestants: the base layer first.
        rates: of the machine, for the limit; its clock is the one that is used.
        patience: how long.
    """
    entered = with_others(contestants, scenario)
    needed, free = _memory_needed(scenario), _memory_free(rates.device)
    if needed > free:
        reason = f"needs about {needed / 2**30:.1f} GiB, {free / 2**30:.1f} GiB are free"
        return Measured(
            _record(scenario, left_out={c.name: reason for c in entered}), {}, frozenset()
        )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what libraries say to their users is not measured here
        subjects, left_out, failed = _subjects(scenario, entered, rates.device)
        if "base" not in subjects:
            return Measured(_record(scenario, left_out=left_out), {}, failed)
        calls = calls_for(subjects["base"].step, rates.device, rates.clock)
        times = interleaved(
            {name: subject.step for name, subject in subjects.items()},
            seconds=patience.seconds,
            least_rounds=patience.least_rounds,
            device=rates.device,
            calls=calls,
            clock=rates.clock,
        )
        limit = rates.seconds(least_work(scenario), scenario.product_dtype)
        of_base = traced(subjects["base"].step, rates.clock, lambda: wait(rates.device))
        entries = [
            _entry(c, subjects[c.name], times, entered, limit, rates, of_base)
            for c in entered
            if c.name in subjects
        ]
    record = _record(
        scenario,
        rounds=len(times["base"]),
        calls=calls,
        limit_seconds=limit,
        entries=tuple(entries),
        left_out=left_out,
    )
    return Measured(record, times, failed)


def _subjects(
    scenario: Scenario, entered: Sequence[Contestant], device: torch.device
) -> tuple[dict[str, Subject], dict[str, str], frozenset[str]]:
    """Those that run, each after one step; why the others do not; and which of these by an error."""
    base = make_base(scenario, device)
    subjects: dict[str, Subject] = {}
    left_out: dict[str, str] = {}
    failed = set()
    for contestant in entered:
        if not contestant.provides(scenario):
            left_out[contestant.name] = NOT_PROVIDED
            continue
        try:
            layer = build(contestant, base, scenario)
            subject = Subject(layer.to(device), scenario, device)
            subject.step()
        except Exception as error:  # a contestant's error is its own, and is told
            left_out[contestant.name] = reason(error)
            failed.add(contestant.name)
            continue
        subjects[contestant.name] = subject
    return subjects, left_out, frozenset(failed)


def reason(error: Exception) -> str:
    """Why a contestant is left out, in one line."""
    first = str(error).partition("\n")[0]
    return f"{type(error).__name__}: {first}"


def _record(scenario: Scenario, **found: Any) -> Record:
    work = least_work(scenario)
    empty = {"rounds": 0, "calls": 0, "limit_seconds": 0.0, "entries": ()}
    return Record(scenario, limit_bytes=work.bytes, limit_flops=work.flops, **{**empty, **found})


def _entry(
    contestant: Contestant,
    subject: Subject,
    times: Mapping[str, list[float]],
    entered: Sequence[Contestant],
    limit: float,
    rates: Rates,
    of_base: Sequence[Operation],
) -> Entry:
    mine, base = times[contestant.name], times["base"]
    others = [c.name for c in entered if c.name in times and _is_compared(contestant, c)]
    least = median(base) + (0.0 if contestant.role == "base" else limit)
    return Entry(
        contestant=contestant.name,
        role=contestant.role,
        version=contestant.version,
        seconds=median(mine),
        quartiles=quartiles(mine),
        time_over_base=median(mine) / median(base),
        overhead_over={other: ratio_of_overheads(mine, times[other], base) for other in others},
        saved_bytes=subject.saved_bytes(),
        peak_bytes=peak_bytes(subject.step, rates.device),
        share_of_limit=least / median(mine),
        stages=stages(subject.step, of_base, rates.clock, lambda: wait(rates.device)),
    )


def _is_compared(contestant: Contestant, other: Contestant) -> bool:
    """With PEFT's layers, and a masked layer with itself in full."""
    if contestant.role == "base" or other.role == "base" or contestant.name == other.name:
        return False
    if other.name.endswith(FULL):
        return other.name == f"{contestant.name} {FULL}"
    return other.role in ("adalora", "lora")


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
    return 4 * (
        3 * s.in_features * s.out_features + 12 * s.tokens * (s.in_features + s.out_features)
    )


def _memory_free(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError):  # not told on every system
        return 2**63

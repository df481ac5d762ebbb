"""What the project wants to reach, and what of it a run did: a ratio and the most that it may be."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from conformance.benchmarks.contestants import ADALORA, FULL, LORA, PACKED
from conformance.benchmarks.grid import Scenario
from conformance.benchmarks.results import Entry, Record, Results

Figure = Callable[[Record, Entry], "float | None"]


@dataclass(frozen=True)
class Target:
    """A sentence, which scenarios it is about, the figure, and the most that it may be."""

    sentence: str
    most: float
    applies: Callable[[Scenario], bool]
    figure: Figure
    unit: str = "x"


@dataclass(frozen=True)
class Reached:
    """A target's figure in one scenario, for one port."""

    target: Target
    port: str
    scenario: Scenario
    value: float

    @property
    def met(self) -> bool:
        return self.value <= self.target.most


def _overhead_over(other: str) -> Figure:
    def figure(record: Record, entry: Entry) -> float | None:
        found = entry.overhead_over.get(other)
        return None if found is None else found.ratio

    return figure


def _overhead_over_full(record: Record, entry: Entry) -> float | None:
    return _overhead_over(f"{entry.contestant} {FULL}")(record, entry)


def _time_over_peft(record: Record, entry: Entry) -> float | None:
    peft = record.entry(ADALORA)
    return None if peft is None else entry.seconds / peft.seconds


def _saved_over_peft(record: Record, entry: Entry) -> float | None:
    peft = record.entry(ADALORA)
    mine, theirs = record.saved_beyond_base(entry), peft and record.saved_beyond_base(peft)
    return None if mine is None or not theirs else mine / theirs


def _large(s: Scenario) -> bool:
    """Training on many tokens of wide layers, nothing unusual about it."""
    wide = min(s.in_features, s.out_features) >= 1024 and s.tokens >= 512
    return s.mode == "step" and wide and not (s.masked or s.checkpoint)


def _plain(s: Scenario) -> bool:
    return _large(s) and s.dropout == 0.0


TARGETS = (
    Target(
        "bf16 training: overhead over PEFT AdaLoRA's",
        0.2,
        lambda s: _plain(s) and s.dtype == "bfloat16",
        _overhead_over(ADALORA),
    ),
    Target(
        "bf16 training: overhead over PEFT LoRA's",
        0.35,
        lambda s: _plain(s) and s.dtype == "bfloat16",
        _overhead_over(LORA),
    ),
    Target(
        "fp32 training: overhead over PEFT AdaLoRA's",
        0.6,
        lambda s: _plain(s) and s.dtype == "float32",
        _overhead_over(ADALORA),
    ),
    Target(
        "1 to 16 tokens: time over PEFT AdaLoRA's",
        1.0,
        lambda s: s.tokens <= 16 and s.mode == "forward",
        _time_over_peft,
    ),
    Target(
        "1 to 16 tokens: overhead over PEFT AdaLoRA's (an aim)",
        0.5,
        lambda s: s.tokens <= 16 and s.mode == "forward",
        _overhead_over(ADALORA),
    ),
    Target(
        "bf16 training: bytes saved over PEFT AdaLoRA's",
        1 / 50,
        lambda s: _plain(s) and s.dtype == "bfloat16",
        _saved_over_peft,
    ),
    Target(
        "dropout 0.1: overhead over PEFT AdaLoRA's",
        0.4,
        lambda s: _large(s) and s.dropout == 0.1,
        _overhead_over(ADALORA),
    ),
    Target(
        "dropout 0.1: bytes saved over PEFT AdaLoRA's",
        1 / 4,
        lambda s: _large(s) and s.dropout == 0.1,
        _saved_over_peft,
    ),
    Target(
        "3/4 of 64 ranks masked: adapter's time over the full one's",
        0.6,
        lambda s: s.masked and s.rank == 64 and s.tokens >= 512,
        _overhead_over_full,
    ),
)


def reached(results: Results) -> list[Reached]:
    """Every target's figure in every scenario that it is about, for every port that was measured."""
    found = []
    for target in TARGETS:
        for record in results.layers:
            if not target.applies(record.scenario):
                continue
            for entry in record.of_role("port"):
                if entry.contestant.endswith(FULL):
                    continue
                if record.entry(f"{entry.contestant} {PACKED}") is not None:
                    continue  # where PEFT's are packed for good, packed copies are what compares
                value = target.figure(record, entry)
                if value is not None:
                    found.append(Reached(target, entry.contestant, record.scenario, value))
    return found


# Of a port's stack over the bare base layers', where their inputs are kept anyway.
STACK_TARGET = (
    "stack of 32 layers with ReLU between: peak memory over the base layers'",
    1.05,
    "ReLU",
)

# Of a port's allocator over PEFT's: the sentence, the most, and the field that has it.
ALLOCATOR_TARGETS = (
    ("rank allocator: importance and masking, time over PEFT's", 0.35, "allocating_step_over"),
    ("rank allocator: state over PEFT's", 0.7, "state_over"),
    ("orthogonal penalty: time over PEFT's", 0.5, "penalty_over"),
)

"""What was measured, as data: records of scenarios, written as JSON (schemas/benchmarks.schema.json)."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from conformance.benchmarks.grid import Scenario

VERSION = "1.1"
SCHEMA_PATH = Path(__file__).parents[1] / "schemas" / "benchmarks.schema.json"
Role = Literal["base", "port", "adalora", "lora"]


@dataclass(frozen=True)
class Ratio:
    """The ratio of two overheads, and its 95 % interval."""

    ratio: float
    low: float
    high: float


@dataclass(frozen=True)
class Stage:
    """A step's operations of one kind: how many, their seconds, the bytes moved and the flops done."""

    kind: str
    operations: int
    seconds: float
    bytes: int
    flops: int


@dataclass(frozen=True)
class Entry:
    """One contestant in one scenario.

    seconds, quartiles: of one call.
    overhead_over: the time beyond the base layer's over another contestant's time beyond it; None where
        the other's cannot be told from nothing.
    saved_bytes: kept for backward, the layer's own tensors and its input not counted; None without a graph.
    share_of_limit: (base + the least time for the contract's work) / seconds.
    stages: the operations of one call that the base layer does not do.
    """

    contestant: str
    role: Role
    version: str
    seconds: float
    quartiles: tuple[float, float]
    time_over_base: float
    overhead_over: Mapping[str, Ratio | None]
    saved_bytes: int | None
    peak_bytes: int
    share_of_limit: float
    stages: tuple[Stage, ...] = ()


@dataclass(frozen=True)
class Record:
    """One scenario: who was measured in it, and the least work that it asks for beyond the base layer's."""

    scenario: Scenario
    rounds: int
    calls: int
    limit_bytes: int
    limit_flops: int
    limit_seconds: float
    entries: tuple[Entry, ...]
    left_out: Mapping[str, str] = field(default_factory=dict)

    def entry(self, contestant: str) -> Entry | None:
        """The contestant's, if it was measured."""
        return next((e for e in self.entries if e.contestant == contestant), None)

    def of_role(self, role: Role) -> list[Entry]:
        return [e for e in self.entries if e.role == role]

    def saved_beyond_base(self, entry: Entry) -> int | None:
        """Bytes kept for backward beyond the base layer's."""
        base = self.entry("base")
        if base is None or base.saved_bytes is None or entry.saved_bytes is None:
            return None
        return entry.saved_bytes - base.saved_bytes


@dataclass(frozen=True)
class AllocatorEntry:
    """One rank allocator: medians of a step's seconds, bytes of the state that it keeps between steps."""

    contestant: str
    role: Role
    version: str
    step_seconds: float
    allocating_step_seconds: float
    penalty_seconds: float
    state_bytes: int
    step_over: Mapping[str, float]
    allocating_step_over: Mapping[str, float]
    penalty_over: Mapping[str, float]
    state_over: Mapping[str, float]


@dataclass(frozen=True)
class AllocatorRecord:
    """Allocators over the same adapters."""

    adapters: int
    rank: int
    shapes: tuple[tuple[int, int], ...]
    rounds: int
    entries: tuple[AllocatorEntry, ...]
    left_out: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class StackEntry:
    """One stack: the most bytes held at once in a step, over those before it, and over another's."""

    contestant: str
    role: Role
    version: str
    peak_bytes: int
    peak_over: Mapping[str, float]


@dataclass(frozen=True)
class StackRecord:
    """Stacks of so many layers, each as the scenario says, with the same function between them."""

    scenario: Scenario
    layers: int
    between: str
    entries: tuple[StackEntry, ...]
    left_out: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Results:
    """A run: where it was, what the machine reaches, and all that was measured."""

    settings: Mapping[str, Any]
    rates: Mapping[str, Mapping[str, float]]
    layers: tuple[Record, ...] = ()
    allocators: tuple[AllocatorRecord, ...] = ()
    stacks: tuple[StackRecord, ...] = ()

    def with_layer(self, record: Record) -> Results:
        """With a record, in the place of one of the same scenario if there is one."""
        others = tuple(r for r in self.layers if r.scenario != record.scenario)
        return replace(self, layers=(*others, record))

    def with_stack(self, record: StackRecord) -> Results:
        """With a record, in the place of one with the same between its layers if there is one."""
        others = tuple(r for r in self.stacks if r.between != record.between)
        return replace(self, stacks=(*others, record))

    def to_json(self) -> dict[str, Any]:
        return {"report_version": VERSION, **_rounded(asdict(self))}

    def write(self, path: Path) -> None:
        """As JSON; a reader never sees half of it."""
        part = path.with_name(f".{path.name}.{os.getpid()}.part")
        text = json.dumps(self.to_json(), indent=1, allow_nan=False) + "\n"
        try:
            part.write_text(text, encoding="utf-8")
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)


def read_results(path: Path) -> Results:
    """What `Results.write` wrote.

    Raises:
        ValueError: for another version's file.
    """
    data = json.loads(path.read_text(encoding="utf-8"))
    if data.get("report_version") != VERSION:
        raise ValueError(
            f"`{path}` has report_version {data.get('report_version')!r}; this reads {VERSION}: "
            "measure again."
        )
    return Results(
        settings=data["settings"],
        rates=data["rates"],
        layers=tuple(_record(r) for r in data["layers"]),
        allocators=tuple(_allocators(r) for r in data["allocators"]),
        stacks=tuple(_stack(r) for r in data["stacks"]),
    )


def _record(data: dict[str, Any]) -> Record:
    entries = tuple(_entry(e) for e in data["entries"])
    return Record(**{**data, "scenario": Scenario(**data["scenario"]), "entries": entries})


def _entry(data: dict[str, Any]) -> Entry:
    over = {k: None if v is None else Ratio(**v) for k, v in data["overhead_over"].items()}
    stages = tuple(Stage(**s) for s in data["stages"])
    quartiles = tuple(data["quartiles"])
    return Entry(**{**data, "overhead_over": over, "quartiles": quartiles, "stages": stages})


def _allocators(data: dict[str, Any]) -> AllocatorRecord:
    entries: Sequence[AllocatorEntry] = [AllocatorEntry(**e) for e in data["entries"]]
    shapes = tuple(tuple(s) for s in data["shapes"])
    return AllocatorRecord(**{**data, "entries": tuple(entries), "shapes": shapes})


def _stack(data: dict[str, Any]) -> StackRecord:
    entries = tuple(StackEntry(**e) for e in data["entries"])
    return StackRecord(**{**data, "scenario": Scenario(**data["scenario"]), "entries": entries})


def _rounded(value: Any) -> Any:
    """Five digits: more than any of these times is good for."""
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, dict):
        return {k: _rounded(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_rounded(v) for v in value]
    return value

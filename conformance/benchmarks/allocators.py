"""Rank allocators: a step's time, with and without masking, the orthogonal penalty's, and the state kept.

The model has the adapters of a model of 7 billion weights: 32 blocks of seven projections, 224 adapters
of rank 12. Blocks share the quantised weights, one for each shape, which no allocator looks at.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from conformance.benchmarks.contestants import (
    ADALORA,
    PEFT_PORT,
    Contestant,
    make_base,
    of_peft,
    of_port,
    twin,
)
from conformance.benchmarks.grid import Scenario
from conformance.benchmarks.limit import Rates
from conformance.benchmarks.measuring import Patience
from conformance.benchmarks.results import AllocatorEntry, AllocatorRecord, Role
from conformance.benchmarks.timing import Step, interleaved, median
from conformance.port import Allocation, load_port

RANK, BLOCKS = 12, 32
NARROW, WIDE = 4096, 11008
# A block's projections, in and out: q, k, v, o; gate, up; down.
SHAPES = ((NARROW, NARROW),) * 4 + ((NARROW, WIDE),) * 2 + ((WIDE, NARROW),)
PARTS = ("step", "masking", "penalty")
# In the middle of the fall of the budget: 500 is a multiple of deltaT, so triplets are chosen.
_CONFIG = {
    "init_r": RANK,
    "target_r": 8,
    "total_step": 1000,
    "tinit": 100,
    "tfinal": 100,
    "deltaT": 10,
}
_OBSERVED, _ALLOCATED = 501, 500


@dataclass(frozen=True)
class AllocatorContestant:
    """A port's layers, and what it offers beside them: see chapter RANK of SPEC.md."""

    layers: Contestant
    allocation: Allocation
    penalty: Callable[[nn.Module], Tensor]

    @property
    def name(self) -> str:
        return self.layers.name


def allocators_of(specs: Iterable[str]) -> list[AllocatorContestant]:
    """The allocators of the ports that have one, and PEFT's if it is installed."""
    ports = [load_port(spec) for spec in specs]
    entered = [(port, of_port(port, port.name)) for port in ports]
    peft, _ = of_peft()
    entered += [(load_port(PEFT_PORT), layers) for layers in peft if layers.name == ADALORA]
    return [
        AllocatorContestant(layers, port.allocation, port.penalty)
        for port, layers in entered
        if port.allocation is not None and port.penalty is not None
    ]


def measure_allocators(
    entered: Sequence[AllocatorContestant],
    rates: Rates,
    patience: Patience,
    *,
    blocks: int = BLOCKS,
    shapes: tuple[tuple[int, int], ...] = SHAPES,
) -> tuple[AllocatorRecord, dict[str, dict[str, list[float]]]]:
    """All of them in turns: the record, and the seconds behind it by part and contestant."""
    steps: dict[str, Step] = {}
    states: dict[str, Callable[[], int]] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        bases = {shape: _base(shape, rates.device) for shape in set(shapes)}
        for contestant in entered:
            model = _model(contestant.layers, bases, blocks, shapes)
            allocator = contestant.allocation.allocator(
                model, contestant.allocation.config(**_CONFIG), "default"
            )
            steps |= _steps(contestant, model, allocator)
            states[contestant.name] = lambda a=allocator, m=model: state_bytes(a, m)  # type: ignore[misc]
        times = interleaved(
            steps,
            seconds=patience.seconds,
            least_rounds=patience.least_rounds,
            device=rates.device,
            clock=rates.clock,
        )
    by_part = {part: {c.name: times[f"{part} {c.name}"] for c in entered} for part in PARTS}
    kept = {name: of() for name, of in states.items()}
    record = AllocatorRecord(
        adapters=blocks * len(shapes),
        rank=RANK,
        shapes=shapes,
        rounds=len(next(iter(times.values()), [])),
        entries=tuple(_entry(c, by_part, kept) for c in entered),
    )
    return record, by_part


def state_bytes(allocator: Any, model: nn.Module) -> int:
    """Bytes of the tensors that are found in an allocator's attributes and are not the model's."""
    own = {t.untyped_storage().data_ptr() for t in model.parameters()}
    own |= {t.grad.untyped_storage().data_ptr() for t in model.parameters() if t.grad is not None}
    found: dict[int, int] = {}
    seen: set[int] = set()
    left: list[Any] = [allocator]
    while left:
        item = left.pop()
        if id(item) in seen or isinstance(item, (nn.Module, type, str, bytes)):
            continue
        seen.add(id(item))
        if isinstance(item, Tensor):
            found[item.untyped_storage().data_ptr()] = item.untyped_storage().nbytes()
        elif isinstance(item, dict):
            left += item.values()
        elif isinstance(item, (list, tuple, set, frozenset)):
            left += item
        elif hasattr(item, "__dict__"):
            left += vars(item).values()
    return sum(size for at, size in found.items() if at not in own)


def _steps(contestant: AllocatorContestant, model: nn.Module, allocator: Any) -> dict[str, Step]:
    def penalty() -> None:
        contestant.penalty(model).backward()  # type: ignore[no-untyped-call]

    return {
        f"step {contestant.name}": lambda: allocator.step(_OBSERVED),
        f"masking {contestant.name}": lambda: allocator.step(_ALLOCATED),
        f"penalty {contestant.name}": penalty,
    }


def _entry(
    contestant: AllocatorContestant,
    times: dict[str, dict[str, list[float]]],
    kept: dict[str, int],
) -> AllocatorEntry:
    name = contestant.name
    seconds = {part: median(times[part][name]) for part in PARTS}
    over = {
        part: {o: seconds[part] / median(t) for o, t in times[part].items() if o != name}
        for part in PARTS
    }
    role: Role = contestant.layers.role
    return AllocatorEntry(
        contestant=name,
        role=role,
        version=contestant.layers.version,
        step_seconds=seconds["step"],
        allocating_step_seconds=seconds["masking"],
        penalty_seconds=seconds["penalty"],
        state_bytes=kept[name],
        step_over=over["step"],
        allocating_step_over=over["masking"],
        penalty_over=over["penalty"],
        state_over={o: kept[name] / size for o, size in kept.items() if o != name and size},
    )


def _model(
    layers: Contestant,
    bases: dict[tuple[int, int], nn.Module],
    blocks: int,
    shapes: tuple[tuple[int, int], ...],
) -> nn.Module:
    """Blocks of adapted layers whose parameters have gradients, the same for everybody."""
    generator = torch.Generator().manual_seed(3)
    model = nn.Module()
    model.layers = nn.ModuleList()
    for _ in range(blocks):
        block = nn.ModuleList(
            layers.build(twin(bases[shape]), _scenario(shape)) for shape in shapes
        )
        model.layers.append(block)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.randn(parameter.shape, generator=generator).to(parameter.device)
    return model


def _base(shape: tuple[int, int], device: torch.device) -> nn.Module:
    return make_base(_scenario(shape), device)


def _scenario(shape: tuple[int, int]) -> Scenario:
    return Scenario(in_features=shape[0], out_features=shape[1], rank=RANK)

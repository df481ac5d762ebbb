"""Benchmarks under pytest: options, one item per scenario and layer, a table, a file of results."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from conformance.benchmarks.allocators import (
    BLOCKS,
    PARTS,
    SHAPES,
    AllocatorContestant,
    allocators_of,
    measure_allocators,
)
from conformance.benchmarks.contestants import Contestant, base_alone, of_peft, of_port
from conformance.benchmarks.grid import GRIDS, Scenario, narrowed
from conformance.benchmarks.limit import Rates
from conformance.benchmarks.machine import description
from conformance.benchmarks.measuring import Measured, Patience, measure
from conformance.benchmarks.results import AllocatorRecord, Results, StackRecord, read_results
from conformance.benchmarks.stacks import BETWEEN, measure_stack
from conformance.benchmarks.table import render
from conformance.benchmarks.timing import CLOCKS
from conformance.devices import resolve_device
from conformance.port import DEFAULT_PORT, PortError, load_port

AllocatorTimes = dict[str, dict[str, list[float]]]


@dataclass
class Bench:
    """What the command line asked for, and what was measured so far."""

    contestants: list[Contestant]
    scenarios: tuple[Scenario, ...]
    rates: Rates
    patience: Patience
    target: Path | None
    results: Results
    allocators: list[AllocatorContestant]
    blocks: int
    notes: list[str] = field(default_factory=list)
    measured: dict[Scenario, Measured] = field(default_factory=dict)
    allocated: tuple[AllocatorRecord, AllocatorTimes] | None = None

    def measure(self, scenario: Scenario) -> Measured:
        """All contestants at once, at the first question about one of them."""
        if scenario not in self.measured:
            found = measure(scenario, self.contestants, self.rates, self.patience)
            self.measured[scenario] = found
            self.keep(self.results.with_layer(found.record))
        return self.measured[scenario]

    def measure_allocators(self) -> tuple[AllocatorRecord, AllocatorTimes]:
        """All allocators at once, at the first question about one of them."""
        if self.allocated is None:
            self.allocated = measure_allocators(
                self.allocators, self.rates, self.patience, blocks=self.blocks
            )
            self.keep(replace(self.results, allocators=(self.allocated[0],)))
        return self.allocated

    def measure_stack(self, between: str) -> StackRecord:
        """All contestants' stacks."""
        record = measure_stack(between, self.contestants, self.rates.device)
        self.keep(self.results.with_stack(record))
        return record

    def is_port(self, contestant: str) -> bool:
        return any(c.name == contestant and c.role == "port" for c in self.contestants)

    def keep(self, results: Results) -> None:
        """Written at once: a run that is cut off has lost nothing."""
        self.results = replace(results, rates=self.rates.to_json())
        if self.target is not None:
            self.results.write(self.target)


class Replay:
    """The clock that pytest-benchmark is given: it shows again what was measured in turns.

    pytest-benchmark runs one function after the other. What disturbs a machine then falls on one of
    them alone, so the layers of a scenario are measured in turns, and it is told of their times.
    """

    def __init__(self) -> None:
        self._now = 0.0
        self._times: Iterator[float] = iter(())

    def load(self, times: list[float]) -> None:
        self._times = iter(times)

    def now(self) -> float:
        return self._now

    def turn(self) -> None:
        self._now += next(self._times, 0.0)


BENCH = pytest.StashKey[Bench]()
REPLAY = Replay()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("layers", "benchmarks of AdaLoRA layers")
    group.addoption(
        "--grid", default="default", choices=list(GRIDS), help="minutes, or all (hours)"
    )
    group.addoption(
        "--only",
        action="append",
        default=[],
        metavar="FIELD=VALUE,...",
        help="scenarios with one of these values, such as tokens=512,2048; repeatable",
    )
    group.addoption("--seconds", type=float, default=Patience.seconds, help="for each scenario")
    group.addoption("--rounds", type=int, default=Patience.least_rounds, help="at least so many")
    group.addoption("--threads", type=int, default=os.cpu_count(), help="torch's, on a CPU")
    group.addoption(
        "--clock",
        choices=list(CLOCKS),
        default="wall",
        help="cpu: the processor's time, for one thread on a machine that others use too",
    )
    group.addoption(
        "--blocks",
        type=int,
        default=BLOCKS,
        help=f"of the model whose ranks are allocated, each of {len(SHAPES)} adapters "
        f"(default: {BLOCKS})",
    )
    group.addoption("--results", type=Path, metavar="JSON", help="write the figures there")
    group.addoption(
        "--append", action="store_true", help="keep what --results has of other scenarios"
    )


@pytest.hookimpl(tryfirst=True)  # before pytest-benchmark reads its options
def pytest_configure(config: pytest.Config) -> None:
    if not config.pluginmanager.hasplugin("benchmark"):
        raise pytest.UsageError(
            "Benchmarks need pytest-benchmark: `python -m pip install pytest-benchmark`."
        )
    config.addinivalue_line("markers", "benchmark: pytest-benchmark's own")
    option = config.option
    # Its tables would be one for each scenario, and ours are printed instead. It still writes and compares.
    option.benchmark_quiet = option.benchmark_quiet or option.verbose <= 0
    config.stash[BENCH] = bench_of(option)
    torch.set_num_threads(option.threads)


def bench_of(option: Any) -> Bench:
    """What the options ask for.

    Raises:
        pytest.UsageError: for what cannot be had, saying what to give instead.
    """
    if option.clock == "cpu" and option.threads != 1:
        raise pytest.UsageError(
            "--clock=cpu adds up what all threads take: give --threads=1 as well."
        )
    device = resolve_device(option.device)  # refused by the suite's conftest if there is none
    try:
        specs = option.port or [DEFAULT_PORT]
        ports = [load_port(spec) for spec in specs]
        allocators = allocators_of(specs)
        scenarios = narrowed(GRIDS[option.grid](), option.only)
    except (PortError, ValueError) as error:
        raise pytest.UsageError(str(error)) from None
    peft, without_peft = of_peft()
    settings = description(device, option.threads, option.clock)
    kept = Results(settings, {})
    if option.append and option.results and option.results.exists():
        kept = read_results(option.results)
        if kept.settings != settings:
            raise pytest.UsageError(
                f"--append: {option.results} was measured elsewhere or otherwise: "
                f"{dict(kept.settings)}, here it is {settings}."
            )
    return Bench(
        contestants=[
            base_alone(str(settings.get("bitsandbytes", "unknown"))),
            *(of_port(port, port.name) for port in ports),
            *peft,
        ],
        scenarios=scenarios,
        rates=Rates(device, CLOCKS[option.clock]),
        patience=Patience(option.seconds, option.rounds),
        target=option.results,
        results=kept,
        allocators=allocators,
        blocks=option.blocks,
        notes=[without_peft] if without_peft else [],
    )


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    bench = metafunc.config.stash[BENCH]
    if "scenario" in metafunc.fixturenames:
        turns = [
            pytest.param(s, c.name, id=f"{s.id}-{c.name}", marks=_marks(s.id))
            for s in bench.scenarios
            for c in bench.contestants
        ]
        metafunc.parametrize(("scenario", "contestant"), turns)
    if "between" in metafunc.fixturenames:
        metafunc.parametrize("between", list(BETWEEN))
    if "allocator" in metafunc.fixturenames:
        asked = [
            pytest.param(part, a.name, id=f"{part}-{a.name}", marks=_marks(f"allocators: {part}"))
            for part in PARTS
            for a in bench.allocators
        ]
        metafunc.parametrize(("part", "allocator"), asked)


def _marks(group: str) -> pytest.MarkDecorator:
    return pytest.mark.benchmark(group=group, timer=REPLAY.now)


@pytest.fixture
def bench(pytestconfig: pytest.Config) -> Bench:
    return pytestconfig.stash[BENCH]


def pytest_report_header(config: pytest.Config) -> list[str]:
    bench = config.stash[BENCH]
    said = ", ".join(f"{k} {v}" for k, v in bench.results.settings.items())
    return [f"benchmarks: {len(bench.scenarios)} scenarios; {said}", *bench.notes]


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    results = config.stash[BENCH].results
    if not (results.layers or results.allocators or results.stacks):
        return
    terminal = terminalreporter._tw
    terminalreporter.write_line("")
    terminalreporter.write(render(results, width=terminal.fullwidth, colour=terminal.hasmarkup))

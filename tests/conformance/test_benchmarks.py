"""The benchmarks' arithmetic: turns, ratios, the limit, memory, grids and targets, on made-up figures."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from jsonschema import Draft202012Validator

from conformance.benchmarks.contestants import (
    ADALORA,
    FULL,
    PACKED,
    Contestant,
    base_alone,
    make_base,
    of_peft,
    of_port,
)
from conformance.benchmarks.grid import Scenario, default_grid, full_grid, narrowed
from conformance.benchmarks.limit import Rates, Work, least_work
from conformance.benchmarks.measuring import Patience, measure
from conformance.benchmarks.memory import peak_bytes, saved_bytes
from conformance.benchmarks.results import SCHEMA_PATH, Entry, Ratio, Record, Results, read_results
from conformance.benchmarks.table import render
from conformance.benchmarks.targets import reached
from conformance.benchmarks.timing import interleaved, ratio_of_overheads
from conformance.port import load_port
from tests.conformance.benchmark_settings import SETTINGS
from tests.conformance.command import PORTS

CPU = torch.device("cpu")
SMALL = Scenario(dtype="float32", tokens=8, in_features=64, out_features=64, rank=4)
SCHEMA = json.loads(SCHEMA_PATH.read_text(encoding="utf-8"))


class Clock:
    """A clock that the steps themselves move."""

    def __init__(self) -> None:
        self.now = 0.0
        self.order: list[str] = []

    def __call__(self) -> float:
        return self.now

    def step(self, name: str, seconds: float) -> Callable[[], None]:
        def run() -> None:
            self.order.append(name)
            self.now += seconds

        return run


def timed(rounds: int, calls: int = 1) -> tuple[Clock, dict[str, list[float]]]:
    clock = Clock()
    steps = {
        name: clock.step(name, seconds) for name, seconds in (("a", 1.0), ("b", 2.0), ("c", 4.0))
    }
    found = interleaved(
        steps, seconds=0.0, least_rounds=rounds, device=CPU, calls=calls, clock=clock
    )
    return clock, found


def test_everybody_has_one_turn_in_every_round() -> None:
    clock, found = timed(rounds=20)
    turns = [clock.order[i : i + 3] for i in range(0, len(clock.order), 3)]

    assert len(turns) == 21  # one to warm up
    assert all(sorted(turn) == ["a", "b", "c"] for turn in turns)
    assert len({tuple(turn) for turn in turns}) == 6  # in every order
    assert found == {"a": [1.0] * 20, "b": [2.0] * 20, "c": [4.0] * 20}


def test_a_turn_of_many_calls_is_told_by_the_call() -> None:
    clock, found = timed(rounds=2, calls=5)

    assert len(clock.order) == 3 * 5 * 3
    assert found["c"] == [4.0, 4.0]


def test_overheads_are_compared_round_by_round() -> None:
    """
    What slows a whole round down, slows all three.
    """
    base = [1.0, 3.0, 1.1, 2.0, 1.0]
    found = ratio_of_overheads([b + 1 for b in base], [b + 4 for b in base], base)

    assert found is not None
    assert (found.ratio, found.low, found.high) == pytest.approx((0.25, 0.25, 0.25))


def test_an_overhead_that_may_be_none_is_compared_with_nothing() -> None:
    base = [1.0, 2.0, 3.0, 4.0]
    assert ratio_of_overheads([5.0] * 4, [4.0, 3.0, 2.0, 1.0], base) is None


def test_the_least_work_of_a_forward_pass() -> None:
    """
    x and base(x) read, y written, A, E and B read; two products.
    """
    s = Scenario(dtype="bfloat16", tokens=10, in_features=6, out_features=7, rank=3, mode="forward")

    assert least_work(s) == Work(
        bytes=2 * 10 * (6 + 2 * 7) + 4 * (3 * 6 + 3 + 3 * 7), flops=2 * 10 * 3 * (6 + 7)
    )


def test_backward_has_twice_the_products_and_masking_spares_only_some() -> None:
    step = Scenario(tokens=10, in_features=6, out_features=7, rank=64)
    forward = replace(step, mode="forward")

    assert least_work(step).flops == 3 * least_work(forward).flops
    # A quarter of forward and of dx and dB; dE and dA need dy @ B and x for every rank.
    assert least_work(replace(step, masked=True)).flops == least_work(forward).flops * 6 // 4


def test_checkpointing_runs_forward_again() -> None:
    again = least_work(replace(SMALL, checkpoint=True))
    assert again == least_work(SMALL) + least_work(replace(SMALL, mode="forward"))


def test_the_limit_is_the_slower_of_memory_and_arithmetic() -> None:
    rates = Rates(CPU, bandwidths={2**20: 1e6}, matmuls={"float32": 1e3})

    assert rates.seconds(Work(bytes=5000, flops=1), torch.float32) == pytest.approx(5e-3)
    assert rates.seconds(Work(bytes=1, flops=7), torch.float32) == pytest.approx(7e-3)


def test_rates_are_measured_once_for_each_size_and_dtype() -> None:
    rates = Rates(CPU)
    first = rates.bandwidth(3 * 2**20)
    rates.matmul(torch.float32)

    assert 1e8 < first < 1e13  # sanity check: bytes a second of a copy
    assert rates.bandwidth(4 * 2**20) == first
    assert set(rates.to_json()["bandwidth"]) == {str(4 * 2**20)}
    assert set(rates.to_json()["matmul"]) == {"float32"}


def test_saved_bytes_count_a_storage_once_and_what_is_held_never() -> None:
    x = torch.ones(10, requires_grad=True)
    w = torch.ones(10)

    def forward() -> torch.Tensor:
        kept = x.exp()  # its result is kept, by exp and by the product
        return (kept * w).view(2, 5) * kept.view(2, 5)

    # exp's result, and the product that the second factor's gradient needs.
    assert saved_bytes(forward, [x, w]) == 2 * 40
    assert saved_bytes(forward, [x]) == 3 * 40


def test_the_peak_is_of_what_is_held_at_once() -> None:
    def step() -> torch.Tensor:
        first = torch.empty(2**20, dtype=torch.uint8)
        del first
        second = torch.empty(2**20, dtype=torch.uint8)
        return torch.cat([second, second])

    assert peak_bytes(step, CPU) == 3 * 2**20


def test_scenarios_have_names_of_their_own() -> None:
    for grid in (default_grid(), full_grid()):
        assert len({s.id for s in grid}) == len(set(grid)) == len(grid)


def test_the_full_grid_has_every_dimension() -> None:
    grid = full_grid()
    asked = {
        "dtype": {"float32", "bfloat16", "float16", "autocast"},
        "tokens": {1, 16, 512, 2048},
        "in_features": {1024, 2048, 4096},
        "out_features": {1024, 2048, 4096, 11008},
        "rank": {8, 64},
        "dropout": {0.0, 0.1},
        "adapters": {1, 3},
        "checkpoint": {False, True},
        "masked": {False, True},
        "mode": {"forward", "step"},
        "kind": {"4bit", "8bit"},
    }
    assert {name: {getattr(s, name) for s in grid} for name in asked} == asked
    assert set(default_grid()) - {replace(s, repack=s.repack) for s in grid} == set()


def test_a_grid_is_narrowed_by_field_and_value() -> None:
    chosen = narrowed(default_grid(), ["tokens=1,16", "dtype=float32", "masked=no"])

    assert chosen
    assert all(s.tokens <= 16 and s.dtype == "float32" and not s.masked for s in chosen)


@pytest.mark.parametrize(
    ("wanted", "said"),
    [
        ("width=3", "FIELD one of kind, dtype"),
        ("tokens=", "FIELD=VALUE"),
        ("tokens=many", "`tokens` is a int"),
        ("masked=1", "`masked` is yes or no"),
    ],
)
def test_a_narrowing_that_means_nothing_is_refused(wanted: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        narrowed(default_grid(), [wanted])


def contestants(*names: str) -> list[Contestant]:
    ports = [of_port(load_port(str(PORTS / f"{name}.py")), name) for name in names]
    return [base_alone("0"), *ports]


def measured(scenario: Scenario, entered: list[Contestant]) -> Record:
    rates = Rates(CPU, bandwidths={2**20: 1e9}, matmuls={"float32": 1e9})
    return measure(scenario, entered, rates, Patience(0.0, 3)).record


def test_a_record_adds_up() -> None:
    record = measured(SMALL, [*contestants("honest_port"), *of_peft()[0]])
    base, port = record.entries[:2]

    assert [e.role for e in record.entries] == ["base", "port", "adalora", "lora"]
    assert (record.rounds, record.left_out) == (3, {})
    assert record.limit_seconds == pytest.approx(max(record.limit_bytes, record.limit_flops) / 1e9)
    assert port.time_over_base == pytest.approx(port.seconds / base.seconds)
    limit = base.seconds + record.limit_seconds
    assert port.share_of_limit == pytest.approx(limit / port.seconds)
    assert (base.time_over_base, base.share_of_limit, base.saved_bytes) == (1.0, 1.0, 0)
    assert port.saved_bytes
    assert port.peak_bytes > base.peak_bytes > 0


def test_a_masked_layer_is_measured_beside_itself_in_full() -> None:
    record = measured(replace(SMALL, masked=True), contestants("honest_port"))

    assert [e.contestant for e in record.entries] == ["base", "honest_port", f"honest_port {FULL}"]
    assert f"honest_port {FULL}" in record.entries[1].overhead_over


def test_a_port_with_packed_copies_is_measured_with_and_without_them() -> None:
    """Within what it offers for that, which lasts as long as the layer is measured."""
    within: list[str] = []

    @contextmanager
    def packing(layer: torch.nn.Module) -> Iterator[None]:
        handle = layer.register_forward_pre_hook(lambda *_: within.append("forward"))
        yield
        handle.remove()

    honest = load_port(str(PORTS / "honest_port.py"))
    offering = of_port(replace(honest, packing=packing), "mine")
    generating = replace(SMALL, mode="forward", repack=True)
    record = measured(generating, [base_alone("0"), offering, *contestants("honest_port")[1:]])

    assert [e.contestant for e in record.entries] == [
        "base",
        "mine",
        f"mine {PACKED}",
        "honest_port",
    ]
    assert within
    plain = measured(replace(generating, repack=False), [base_alone("0"), offering])
    assert [e.contestant for e in plain.entries] == ["base", "mine"]


@pytest.mark.parametrize("masked", [False, True])
def test_a_masked_layer_has_a_quarter_of_its_ranks(masked: bool) -> None:
    s = replace(SMALL, rank=64, masked=masked)
    layer = contestants("honest_port")[1].build(make_base(s, CPU), s)

    assert int((layer.lora_E["default"] != 0).sum()) == s.live_rank == (16 if masked else 64)


def test_a_layer_that_cannot_be_built_is_left_out_with_its_reason() -> None:
    def build(base: torch.nn.Module, scenario: Scenario) -> torch.nn.Module:
        raise RuntimeError("no such layer\nand more")

    record = measured(SMALL, [*contestants(), Contestant("broken", "port", "0", build)])

    assert record.left_out == {"broken": "RuntimeError: no such layer"}
    assert [e.contestant for e in record.entries] == ["base"]


def test_what_does_not_fit_is_not_tried() -> None:
    record = measured(replace(SMALL, out_features=2**40), contestants("honest_port"))

    assert record.entries == ()
    assert "GiB are free" in record.left_out["honest_port"]


def test_without_peft_its_columns_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    for name in ("conformance.benchmarks.peft_lora", "conformance.ports.peft"):
        monkeypatch.delitem(sys.modules, name, raising=False)

    found, reason = of_peft()

    assert found == []
    assert "PEFT is not measured" in reason
    record = measured(SMALL, contestants("honest_port"))
    assert record.entries[1].overhead_over == {}
    assert "honest_port" in render(results(record), width=80, colour=False)


def entry(name: str, role: str, seconds: float, saved: int, **over: float) -> Entry:
    return Entry(
        contestant=name,
        role=role,  # type: ignore[arg-type]
        version="0",
        seconds=seconds,
        quartiles=(seconds, seconds),
        time_over_base=seconds,
        overhead_over={k.replace("_", " "): Ratio(v, v / 2, v * 2) for k, v in over.items()},
        saved_bytes=saved,
        peak_bytes=100,
        share_of_limit=0.5,
    )


def record(scenario: Scenario, *entries: Entry) -> Record:
    return Record(scenario, 3, 1, 10, 20, 0.1, entries)


def results(*records: Record) -> Results:
    return Results(SETTINGS, {"bandwidth": {}, "matmul": {}}, records)


TRAINING = record(
    Scenario(),
    entry("base", "base", 1.0, 8),
    entry("mine", "port", 1.3, 18, **{ADALORA.replace(" ", "_"): 0.3}),
    entry(ADALORA, "adalora", 2.0, 1008),
)


def test_where_peft_is_packed_for_good_packed_copies_are_what_is_compared() -> None:
    generating = replace(
        TRAINING,
        scenario=Scenario(tokens=1, mode="forward", repack=True),
        entries=(*TRAINING.entries, entry(f"mine {PACKED}", "port", 1.0, 8)),
    )
    assert {r.port for r in reached(results(generating))} == {f"mine {PACKED}"}


def test_targets_are_judged_in_the_scenarios_that_they_are_about() -> None:
    generating = replace(
        TRAINING, scenario=Scenario(tokens=1, mode="forward"), entries=TRAINING.entries
    )
    found = {
        (r.target.sentence, r.scenario.tokens): r for r in reached(results(TRAINING, generating))
    }

    overhead = found["bf16 training: overhead over PEFT AdaLoRA's", 512]
    assert (overhead.value, overhead.met) == (0.3, False)
    saved = found["bf16 training: bytes saved over PEFT AdaLoRA's", 512]
    assert (saved.value, saved.met) == (0.01, True)
    time = found["1 to 16 tokens: time over PEFT AdaLoRA's", 1]
    assert (time.value, time.met) == (0.65, True)
    assert not [key for key in found if "LoRA's" in key[0] and "AdaLoRA" not in key[0]]


def test_results_survive_their_file_and_have_the_published_form(tmp_path: Path) -> None:
    written = results(TRAINING)
    written.write(tmp_path / "r.json")

    assert read_results(tmp_path / "r.json") == written
    Draft202012Validator.check_schema(SCHEMA)
    Draft202012Validator(SCHEMA).validate(written.to_json())
    assert list(tmp_path.iterdir()) == [tmp_path / "r.json"]


def test_a_file_of_another_version_is_refused(tmp_path: Path) -> None:
    (tmp_path / "r.json").write_text('{"report_version": "0.1"}')
    with pytest.raises(ValueError, match=r"report_version '0.1'; this reads 1.1"):
        read_results(tmp_path / "r.json")


def test_a_scenario_measured_again_takes_its_own_place() -> None:
    again = replace(TRAINING, rounds=9)
    assert results(TRAINING).with_layer(again).layers == (again,)

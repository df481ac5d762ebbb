"""docs/performance.md: written from the files beside it, and in step with them; stages and the picture."""

from __future__ import annotations

import shutil
import time
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch

from conformance.benchmarks.__main__ import main
from conformance.benchmarks.grid import Scenario
from conformance.benchmarks.page import render
from conformance.benchmarks.picture import picture
from conformance.benchmarks.results import (
    AllocatorEntry,
    AllocatorRecord,
    Entry,
    Record,
    Results,
    StackEntry,
    StackRecord,
    Stage,
)
from conformance.benchmarks.stages import KINDS, Trace, stages, traced
from tests.conformance.benchmark_settings import SETTINGS

DOCS = Path(__file__).parents[2] / "docs"
TRIED = {
    "about": "Ideas.",
    "tried": [
        {"idea": "an idea", "prediction": "half", "result": "double, {small[one]}", "kept": "no"}
    ],
    "again": ["pytest conformance/benchmarks"],
}


def test_the_page_is_what_its_files_say(tmp_path: Path) -> None:
    shutil.copytree(DOCS / "performance", tmp_path / "performance")

    assert main([f"--docs={tmp_path}"]) == 0
    for name in ("performance.md", "performance/overhead.svg"):
        assert (tmp_path / name).read_text() == (DOCS / name).read_text(), "run the command again"


def test_without_results_it_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([f"--docs={tmp_path}"]) == 2
    assert "results.json" in capsys.readouterr().err


def test_operations_are_counted_by_kind_with_their_bytes_and_flops() -> None:
    x, w = torch.ones(4, 8), torch.ones(8, 2)

    def step() -> None:
        y = (x @ w).to(torch.float64)  # 4 x 2
        y.t()[0].view(-1, 1)  # views move nothing
        y.mul_(2.0)
        torch.empty(1000)

    found = {s.kind: s for s in stages(step, [], time.perf_counter)}

    assert tuple(found) == KINDS
    product, cast, rest = (found[k] for k in ("products", "casts and copies", "the rest"))
    assert (product.operations, product.flops) == (1, 2 * 4 * 8 * 2)
    assert product.bytes == 4 * (4 * 8 + 8 * 2 + 4 * 2)
    assert (cast.operations, cast.bytes) == (1, 8 * 4 + 8 * 8)
    assert (rest.operations, rest.bytes) == (1, 2 * 8 * 8)  # y read and written
    assert found["random numbers"].operations == found["quantised weight"].operations == 0
    assert product.seconds > 0.0


def test_backward_is_traced_too() -> None:
    x = torch.ones(4, 8, requires_grad=True)
    with Trace(time.perf_counter) as trace:
        (x @ torch.ones(8, 2)).sum().backward()

    assert [o.kind for o in trace.operations].count("products") == 2


def test_a_product_in_place_is_a_product() -> None:
    y, x, w = torch.ones(4, 2), torch.ones(4, 8), torch.ones(8, 2)
    with Trace(time.perf_counter) as trace:
        y.addmm_(x, w)
        y.add_(1.0)

    assert [o.kind for o in trace.operations] == ["products", "the rest"]
    assert [o.flops for o in trace.operations] == [2 * 4 * 8 * 2, 0]


def test_a_layer_is_told_by_what_its_base_layer_does_not_do() -> None:
    x, w, q = torch.ones(4, 8), torch.ones(8, 2), torch.ones(8, 3)

    def base() -> None:
        x @ w

    def mine() -> None:
        x @ w
        x @ w
        x @ q

    of_base = traced(base, time.perf_counter, lambda: None)
    product = stages(mine, of_base, time.perf_counter)[KINDS.index("products")]

    assert (product.operations, product.flops) == (2, 2 * 4 * 8 * (2 + 3))


def made_up(bf16: Scenario) -> Results:
    def entry(name: str, role: str, seconds: float) -> Entry:
        kept = tuple(Stage(kind, 1, seconds / 10, 10, 10) for kind in KINDS)
        return Entry(name, role, "0", seconds, (1, 2), seconds, {}, 10, 10**6, 0.5, kept)  # type: ignore[arg-type]

    entries = (entry("base", "base", 1.0), entry("mine <1>", "port", 1.5))
    stack = StackEntry("mine", "port", "0", 3 * 10**6, {"base": 1.5})
    allocator = AllocatorEntry("mine", "port", "0", 1.0, 2.0, 3.0, 4, {}, {}, {}, {})
    return Results(
        SETTINGS,
        {"bandwidth": {str(2**20): 1e9}, "matmul": {"bfloat16": 1e12}},
        (Record(bf16, 3, 1, 10, 10, 0.25, entries, {"other": "not provided"}),),
        (AllocatorRecord(224, 12, ((4, 4),), 3, (allocator,)),),
        (StackRecord(bf16, 32, "ReLU", (stack,)),),
    )


def test_without_peft_and_cuda_the_page_is_whole_all_the_same() -> None:
    text = render(made_up(Scenario()), TRIED, None, {"small": {"one": 1.5}})

    assert "| `4bit-bf16-512x1024x1024-r8-step` | 1e+03 | 1.25 | mine <1> | 1.50 |" in text
    assert "left out: not provided" in text
    assert "not measured" in text
    assert "| an idea | half | double, 1.5 | no |" in text
    assert "1.0 GB/s over 1 MiB" in text
    assert "| 32 x `4bit-bf16-512x1024x1024-r8-step` | ReLU | mine | 3.0 | 1.500 |  |" in text
    assert "peak memory over the base layers' | 1.05 | 1.5 | 0 of 1 |" in text
    assert "| mine | 1000 | 2000 | 3000 | 0 |" in text


def test_the_targets_of_another_run_are_shown_beside() -> None:
    results = made_up(Scenario())
    other = replace(results, settings={**SETTINGS, "threads": 2, "clock": "wall"}, stacks=())
    text = render(results, TRIED, None, {"small": {"one": 1.5}}, {"On all threads": other})
    one, both = text[: text.index("## Layers")].split("### On all threads")

    assert "1 thread" in one
    assert "2 threads; wall clock" in both
    assert "over the base layers' | 1.05 | 1.5 | 0 of 1 |" in one
    assert "over the base layers' | 1.05 |  | not measured |" in both


def test_it_says_what_the_products_alone_would_come_to() -> None:
    results = made_up(Scenario())
    record = results.layers[0]
    mine = record.entries[1]
    peft = replace(mine, contestant="PEFT AdaLoRA", role="adalora", seconds=3.0)
    both = replace(results, layers=(replace(record, entries=(*record.entries, peft)),))
    row = next(r for r in render(both, TRIED, None, {"small": {"one": 1.5}}).splitlines()
               if r.startswith("| `4bit-bf16-512x1024x1024-r8-step` | mine <1> | 500"))  # fmt: skip

    assert row.endswith("| 0.07 |")  # 0.15 of 2 seconds


def test_the_picture_is_well_formed_and_has_every_training_scenario() -> None:
    results = made_up(Scenario())
    generating = replace(results.layers[0], scenario=Scenario(tokens=1, mode="forward"))
    drawn = picture(replace(results, layers=(*results.layers, generating)))
    root = ElementTree.fromstring(drawn)

    titles = [t.text for t in root.iter("{http://www.w3.org/2000/svg}title")][1:]
    assert titles == ["4bit-bf16-512x1024x1024-r8-step: mine <1> 1.50"]

"""`python -m tests.traffic`: docs/performance/cuda.json, what the layers' operations for CUDA move and do.

No GPU is used: the layers take their way for CUDA on a CPU, as `tests/qsvd/test_products.py` makes them,
and their operations are counted as they pass torch's dispatcher.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from conformance.benchmarks.contestants import base_alone, build, make_base, of_peft, of_port
from conformance.benchmarks.grid import Scenario
from conformance.benchmarks.limit import least_work
from conformance.benchmarks.measuring import Subject
from conformance.benchmarks.stages import KINDS, Operation, stages, traced
from conformance.port import load_port
from qsvd import _products

TARGET = Path(__file__).parents[2] / "docs" / "performance" / "cuda.json"
RANKS = (8, 16, 64)
# An H100 SXM's data sheet: TB/s, and dense TFLOP/s in bf16.
RATES = {"bandwidth": 3.35, "flops": 989}
_SHOWN = [kind for kind in KINDS if kind != "quantised weight"]


def main() -> int:
    scenarios = [Scenario(tokens=8192, in_features=4096, out_features=4096, rank=r) for r in RANKS]
    data = {
        "rates": RATES,
        "kinds": _SHOWN,
        "scenarios": [{"name": f"rank {s.rank}", "layers": layers_of(s)} for s in scenarios],
    }
    TARGET.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    print(TARGET)
    return 0


def layers_of(scenario: Scenario) -> list[dict[str, Any]]:
    """The least, then what each layer does beyond its base layer."""
    cpu = torch.device("cpu")
    contestants = [base_alone("0"), of_port(load_port("qsvd"), "qsvd"), *of_peft()[0]]
    base = make_base(scenario, cpu)
    found, saved = {}, {}
    of_base: list[Operation] = []

    def clock() -> float:
        return 0.0

    with as_on_cuda():
        for contestant in contestants:
            subject = Subject(build(contestant, base, scenario), scenario, cpu)
            subject.step()
            if contestant.role == "base":
                of_base = traced(subject.step, clock, lambda: None)
            found[contestant.name] = stages(subject.step, of_base, clock, repeats=1)
            saved[contestant.name] = subject.saved_bytes() or 0
    least = least_work(scenario)
    rows = [_row("the least", {_SHOWN[0]: least.bytes}, least.flops, 0, 0)]
    for name, kinds in found.items():
        if name == "base":
            continue
        more = [s for s in kinds if s.kind in _SHOWN]
        flops, count = sum(s.flops for s in more), sum(s.operations for s in more)
        kept = saved[name] - saved["base"]
        rows.append(_row(name, {s.kind: s.bytes for s in more}, flops, count, kept))
    return rows


def _row(
    name: str, moved: dict[str, int], flops: int, operations: int, saved: int
) -> dict[str, Any]:
    by_memory = sum(moved.values()) / (RATES["bandwidth"] * 1e12)
    by_arithmetic = flops / (RATES["flops"] * 1e12)
    return {
        "name": name,
        "bytes": {kind: moved.get(kind, 0) for kind in _SHOWN},
        "flops": flops,
        "operations": operations,
        "saved": saved,
        "microseconds": round(1e6 * max(by_memory, by_arithmetic), 1),
    }


@contextmanager
def as_on_cuda() -> Iterator[None]:
    """Layers take their way for CUDA, and a CPU multiplies halves into fp32 as a GPU does."""
    library = torch.library.Library("aten", "IMPL")
    library.impl("mm.dtype", lambda a, b, dtype: a.to(dtype) @ b.to(dtype), "CPU")
    try:
        with mock.patch.object(_products, "_on_cuda", return_value=True):
            yield
    finally:
        library._destroy()


if __name__ == "__main__":
    sys.exit(main())

"""The memory of stacks of layers: collected only if this folder is named."""

from __future__ import annotations

import pytest

from conformance.benchmarks.conftest import Bench


def test_stack(between: str, bench: Bench) -> None:
    record = bench.measure_stack(between)
    errors = {name: said for name, said in record.left_out.items() if bench.is_port(name)}
    errors = {name: said for name, said in errors.items() if said != "not provided"}
    if errors:
        pytest.fail("; ".join(f"{name}: {said}" for name, said in errors.items()))

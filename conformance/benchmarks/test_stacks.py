"""The memory of stacks of layers: collected only if this folder is named."""

from __future__ import annotations

import pytest

from conformance.benchmarks.conftest import Bench
from conformance.benchmarks.measuring import NOT_PROVIDED


def test_stack(between: str, bench: Bench) -> None:
    record = bench.measure_stack(between)
    errors = [
        f"{name}: {said}"
        for name, said in record.left_out.items()
        if bench.is_port(name) and said != NOT_PROVIDED
    ]
    if errors:
        pytest.fail("; ".join(errors))

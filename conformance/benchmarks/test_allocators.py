"""The rank allocators' speed and memory: collected only if this folder is named."""

from __future__ import annotations

from typing import Any

import pytest

from conformance.benchmarks.conftest import REPLAY, Bench


def test_allocator(part: str, allocator: str, bench: Bench, benchmark: Any) -> None:
    record, times = bench.measure_allocators()
    entry = next((e for e in record.entries if e.contestant == allocator), None)
    if entry is None:
        pytest.skip(record.left_out[allocator])
    benchmark.extra_info.update(state_bytes=entry.state_bytes)
    REPLAY.load(times[part][allocator])
    benchmark.pedantic(REPLAY.turn, rounds=record.rounds)

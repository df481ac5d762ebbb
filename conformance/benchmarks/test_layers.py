"""The layers' speed and memory: collected only if this folder is named."""

from __future__ import annotations

from typing import Any

import pytest

from conformance.benchmarks.conftest import REPLAY, Bench
from conformance.benchmarks.grid import Scenario


def test_layer(scenario: Scenario, contestant: str, bench: Bench, benchmark: Any) -> None:
    found = bench.measure(scenario)
    entry = found.record.entry(contestant)
    if entry is None:
        reason = found.record.left_out[contestant]
        if contestant in found.failed and bench.is_port(contestant):
            pytest.fail(reason)
        pytest.skip(reason)
    benchmark.extra_info.update(
        time_over_base=entry.time_over_base,
        saved_bytes=entry.saved_bytes,
        peak_bytes=entry.peak_bytes,
        share_of_limit=entry.share_of_limit,
    )
    times = found.times[contestant]
    REPLAY.load(times)
    benchmark.pedantic(REPLAY.turn, rounds=len(times))

"""The limit: what the contract asks for at the least, at the rates that this machine was seen to reach.

The base layer is called as it is, so nothing of it can be saved, and y is written by somebody else
before the adapter's update is added to it. Beyond that, with n rows and s bytes an element of x and y:

    forward      read x, read base(x), write y; read A, E, B
                 x @ Q.T and h @ B.T, for the ranks whose E is not zero
    backward     read dy, read x, read the base layer's dx, write the sum; read A, E, B, write their gradients
                 dy @ B and the product with x for every rank, since dE needs both; dx and dB for live ranks
    between      h (n, r) in fp32, written and read once, which costs less than computing it again

Several adapters share one pass over x, y, dy and dx. Checkpointing runs the forward pass twice. Drawing
dropout's random numbers is not counted. Bytes and flops overlap at best: the limit is the larger of the two.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from conformance.benchmarks.grid import Scenario
from conformance.benchmarks.timing import Clock, median

_FP32 = 4
_SQUARE = 1024


@dataclass(frozen=True)
class Work:
    """Bytes to and from memory, and floating-point operations."""

    bytes: int
    flops: int

    def __add__(self, other: Work) -> Work:
        return Work(self.bytes + other.bytes, self.flops + other.flops)


def least_work(scenario: Scenario) -> Work:
    """The least that the contract needs beyond the base layer's own work."""
    if scenario.mode == "forward":
        return _forward(scenario)
    again = _forward(scenario) if scenario.checkpoint else Work(0, 0)
    return _forward(scenario) + again + _backward(scenario)


def _forward(s: Scenario) -> Work:
    n, wide = s.tokens, s.x_dtype.itemsize
    live = s.live_rank * s.adapters
    rows = n * wide * (s.in_features + 2 * s.out_features)
    return Work(
        bytes=rows + _FP32 * live * (s.in_features + 1 + s.out_features),
        flops=2 * n * live * (s.in_features + s.out_features),
    )


def _backward(s: Scenario) -> Work:
    n, wide = s.tokens, s.x_dtype.itemsize
    rank, live = s.rank * s.adapters, s.live_rank * s.adapters
    both = s.in_features + s.out_features
    rows = n * wide * (s.out_features + 3 * s.in_features)
    return Work(
        bytes=rows + 2 * _FP32 * rank * (both + 1) + 2 * _FP32 * n * live,
        flops=2 * n * rank * both + 2 * n * live * both,
    )


@dataclass
class Rates:
    """What this machine reaches: bytes a second on so large a working set, flops a second by dtype."""

    device: torch.device
    clock: Clock = time.perf_counter
    bandwidths: dict[int, float] = field(default_factory=dict)
    matmuls: dict[str, float] = field(default_factory=dict)

    def seconds(self, work: Work, dtype: torch.dtype) -> float:
        return max(work.bytes / self.bandwidth(work.bytes), work.flops / self.matmul(dtype))

    def bandwidth(self, working_set: int) -> float:
        """Bytes a second of a copy that touches as many bytes, to the next power of two.

        Small sets are in the cache, so the rate depends on the size; below 1 MiB what is measured
        would be the call.
        """
        size = max(2**20, 1 << (working_set - 1).bit_length())
        if size not in self.bandwidths:
            source = torch.ones(size // 8, device=self.device)
            target = torch.empty_like(source)
            self.bandwidths[size] = size / self._fastest(lambda: target.copy_(source))
        return self.bandwidths[size]

    def matmul(self, dtype: torch.dtype) -> float:
        """Flops a second of a square product."""
        name = str(dtype).removeprefix("torch.")
        if name not in self.matmuls:
            slow = dtype == torch.float16 and self.device.type == "cpu"
            size = _SQUARE // 4 if slow else _SQUARE * (1 if self.device.type == "cpu" else 8)
            a = torch.ones(size, size, dtype=dtype, device=self.device)
            self.matmuls[name] = 2 * size**3 / self._fastest(lambda: a @ a)
        return self.matmuls[name]

    def to_json(self) -> dict[str, dict[str, float]]:
        """What was measured: bytes a second by the working set's bytes, flops a second by dtype."""
        sizes = sorted(self.bandwidths)
        return {
            "bandwidth": {str(size): self.bandwidths[size] for size in sizes},
            "matmul": dict(self.matmuls),
        }

    def _fastest(self, call: Callable[[], object], repeats: int = 9) -> float:
        """The lower quartile of a few, after one: a limit is what can be reached."""
        times = []
        for _ in range(repeats + 1):
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
            start = self.clock()
            call()
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
            times.append(self.clock() - start)
        return median(sorted(times[1:])[: repeats // 2 + 1])

"""Times of several functions, taken in turns, and what can be said of them in spite of the noise."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from conformance.benchmarks.results import Ratio

Step = Callable[[], object]
Clock = Callable[[], float]
# What a user waits for; and, for one thread on a machine that others use too, what it really takes.
CLOCKS: Mapping[str, Clock] = {"wall": time.perf_counter, "cpu": time.process_time}
_RESAMPLES = 1000


def interleaved(
    steps: Mapping[str, Step],
    *,
    seconds: float,
    least_rounds: int,
    device: torch.device,
    most_rounds: int = 300,
    calls: int = 1,
    clock: Clock = time.perf_counter,
) -> dict[str, list[float]]:
    """Seconds of one call of every step, by name, one turn of each in a round.

    Each round has an order of its own, so that nobody always follows the same other, whose data
    is then in the cache. All lists are as long as each other, and element i is of round i.

    Args:
        steps: what is timed; each is called once more before, to warm up.
        seconds: rounds go on for so long,
        least_rounds: but there are at least so many,
        most_rounds: and at most so many.
        calls: how often a step is called in its turn: more than once where one is over too soon.
    """
    rng = np.random.default_rng(0)
    names = list(steps)
    times: dict[str, list[float]] = {name: [] for name in names}
    _round(steps, names, calls, device, clock)
    gc_was_on = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        end = time.perf_counter() + seconds
        done = 0
        while done < least_rounds or (time.perf_counter() < end and done < most_rounds):
            order = [names[i] for i in rng.permutation(len(names))]
            for name, taken in _round(steps, order, calls, device, clock).items():
                times[name].append(taken)
            done += 1
    finally:
        if gc_was_on:
            gc.enable()
    return times


def _round(
    steps: Mapping[str, Step],
    order: Sequence[str],
    calls: int,
    device: torch.device,
    clock: Clock,
) -> dict[str, float]:
    taken = {}
    for name in order:
        wait(device)
        if device.type == "cuda":
            taken[name] = _on_cuda(steps[name], calls)
            continue
        start = clock()
        for _ in range(calls):
            steps[name]()
        taken[name] = (clock() - start) / calls
    return taken


def _on_cuda(step: Step, calls: int) -> float:
    """Seconds of a call between two events of the stream: what the host does beside is not waited for."""
    event: Any = torch.cuda.Event
    start, end = event(enable_timing=True), event(enable_timing=True)
    start.record()
    for _ in range(calls):
        step()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / 1000.0 / calls


def calls_for(step: Step, device: torch.device, clock: Clock, enough: float = 5e-3) -> int:
    """How many calls take so many seconds, at least one: a turn that is over sooner is all noise."""
    taken = []
    for _ in range(4):
        wait(device)
        start = clock()
        step()
        wait(device)
        taken.append(clock() - start)
    return max(1, round(enough / max(min(taken[1:]), 1e-7)))


def wait(device: torch.device) -> None:
    """Until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def median(times: Sequence[float]) -> float:
    return float(np.median(np.asarray(times)))


def ratio_of_overheads(
    mine: Sequence[float], other: Sequence[float], base: Sequence[float]
) -> Ratio | None:
    """(median(mine) - median(base)) / (median(other) - median(base)), and its 95 % interval.

    The interval is of bootstrap samples of whole rounds, since what disturbs one disturbs all of
    it. None where the other's overhead is not told from nothing.
    """
    rounds = np.asarray([mine, other, base])  # 3, rounds
    rng = np.random.default_rng(0)
    chosen = rng.integers(rounds.shape[1], size=(_RESAMPLES, rounds.shape[1]))
    a, b, c = np.median(rounds[:, chosen], axis=2)  # resamples each
    if np.quantile(b - c, 0.025) <= 0.0:
        return None
    low, high = np.quantile((a - c) / np.maximum(b - c, np.finfo(float).tiny), [0.025, 0.975])
    a, b, c = np.median(rounds, axis=1)
    return Ratio(float((a - c) / (b - c)), float(low), float(high))


def quartiles(times: Sequence[float]) -> tuple[float, float]:
    """The lower and the upper quartile."""
    low, high = np.quantile(np.asarray(times), [0.25, 0.75])
    return float(low), float(high)

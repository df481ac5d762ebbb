"""Times of several functions, taken in turns, and what can be said of them in spite of the noise."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch

Step = Callable[[], object]
_RESAMPLES = 1000


def interleaved(
    steps: Mapping[str, Step],
    *,
    seconds: float,
    least_rounds: int,
    device: torch.device,
    most_rounds: int = 300,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Seconds of every step, by name, one of each in a round.

    Each round has an order of its own, so that nobody always follows the same other, whose data
    is then in the cache. All lists are as long as each other, and element i is of round i.

    Args:
        steps: what is timed; each is called once more before, to warm up.
        seconds: rounds go on for so long,
        least_rounds: but there are at least so many,
        most_rounds: and at most so many.
    """
    rng = np.random.default_rng(0)
    names = list(steps)
    times: dict[str, list[float]] = {name: [] for name in names}
    _round(steps, names, device, clock)
    gc_was_on = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        end = clock() + seconds
        done = 0
        while done < least_rounds or (clock() < end and done < most_rounds):
            order = [names[i] for i in rng.permutation(len(names))]
            for name, taken in _round(steps, order, device, clock).items():
                times[name].append(taken)
            done += 1
    finally:
        if gc_was_on:
            gc.enable()
    return times


def _round(
    steps: Mapping[str, Step],
    order: Sequence[str],
    device: torch.device,
    clock: Callable[[], float],
) -> dict[str, float]:
    taken = {}
    for name in order:
        _wait(device)
        start = clock()
        kept = steps[name]()
        _wait(device)
        taken[name] = clock() - start
        del kept
    return taken


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def median(times: Sequence[float]) -> float:
    return float(np.median(np.asarray(times)))


def ratio_of_overheads(
    mine: Sequence[float], other: Sequence[float], base: Sequence[float]
) -> tuple[float, float, float] | None:
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
    return float((a - c) / (b - c)), float(low), float(high)

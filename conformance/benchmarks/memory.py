"""What a step keeps for backward, and the most that it holds at once, in bytes."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

_MEMORY_EVENT = "[memory]"


def saved_bytes(forward: Callable[[], Tensor], held: Iterable[Tensor]) -> int:
    """Bytes of the storages that autograd keeps for the backward pass of `forward`.

    A storage counts once, however many tensors view it, and whole, since any view keeps all of it.

    Args:
        forward: builds the graph.
        held: tensors that are there anyway, and so are not counted: parameters, quantised weights
            and the layer's input.
    """
    anyway = {_storage(t) for t in held}
    found: dict[tuple[str, int], int] = {}
    alive = []  # a storage that is freed could lend its address to the next

    def pack(t: Tensor) -> Tensor:
        found[_storage(t)] = t.untyped_storage().nbytes()
        alive.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = forward()
    del y
    return sum(size for key, size in found.items() if key not in anyway)


def _storage(t: Tensor) -> tuple[str, int]:
    return str(t.device), t.untyped_storage().data_ptr()


def peak_bytes(step: Callable[[], object], device: torch.device) -> int:
    """The most bytes that torch's allocator held at once during a step, over those before it.

    On CUDA as the allocator counts them. Elsewhere the sum over the allocations that torch's
    profiler recorded; what a library allocates by itself, oneDNN's scratch space say, is not seen.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        step()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        kept = step()
    del kept
    held = peak = 0
    for event in sorted(_memory_events(profiled), key=lambda e: e[0]):
        held += event[1]
        peak = max(peak, held)
    return peak


def _memory_events(profiled: profile) -> list[tuple[int, int]]:
    """When, and how many bytes: negative ones were freed."""
    results: Any = profiled.profiler.kineto_results if profiled.profiler else None
    return [(e.start_ns(), e.nbytes()) for e in results.events() if e.name() == _MEMORY_EVENT]

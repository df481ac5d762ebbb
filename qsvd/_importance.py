"""How much a triplet matters: smoothed sensitivity times its uncertainty (paper, equations 8 to 11).

    I = |w dw|                              sensitivity of one weight, this step
    mean = beta1 mean + (1 - beta1) I       smoothed
    unc  = beta2 unc  + (1 - beta2) |I - mean|      with the new mean
    s = mean * unc                          importance of one weight
    S_j = s(E_j) + mean over i of s(A_ji) + mean over o of s(B_oj)       of the triplet j

Nothing here remembers anything: whoever calls holds the two averages.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

# Products of one chunk, held for a moment: in a core's cache on a CPU, one launch on a GPU.
_CHUNK = {"cpu": 2**16, "cuda": 2**24}


def update_averages(
    weights: Sequence[Tensor],
    gradients: Sequence[Tensor],
    means: Sequence[Tensor],
    uncertainties: Sequence[Tensor],
    beta1: float,
    beta2: float,
    grad_scale: float = 1.0,
) -> None:
    """Move the two averages of every weight by one step, in place.

    Args:
        weights, gradients, means, uncertainties: of the same shapes, one by one.
        beta1, beta2: decay of the means and of the uncertainties.
        grad_scale: what the loss was multiplied by; the gradients are divided by it.
    """
    for part in _chunks(weights):
        ws, gs, ms, us = (list(a[part]) for a in (weights, gradients, means, uncertainties))
        now = torch._foreach_mul(ws, gs)
        if grad_scale != 1.0:
            torch._foreach_div_(now, grad_scale)
        torch._foreach_abs_(now)
        torch._foreach_lerp_(ms, now, 1.0 - beta1)
        torch._foreach_sub_(now, ms)
        torch._foreach_abs_(now)
        torch._foreach_lerp_(us, now, 1.0 - beta2)


def all_finite(gradients: Sequence[Tensor]) -> bool:
    """Whether no gradient holds an infinity or a NaN."""
    held = [g for g in gradients if g.numel()]  # a layer of rank 0 has none
    on_cpu = all(g.device.type == "cpu" for g in held)
    # There a sum takes a tenth of a maximum's time; it may leave the range where no element does.
    if on_cpu and _finite([g.sum() for g in held]):
        return True
    return _finite(torch._foreach_norm(held, float("inf")))


def _finite(numbers: Sequence[Tensor]) -> bool:
    if not numbers:
        return True
    return bool(torch.stack([n.to(numbers[0].device) for n in numbers]).isfinite().all())


def triplet_importance(a: Tensor, e: Tensor, b: Tensor) -> Tensor:
    """S (r,) of one layer's triplets, from s of its A (r, in), E (r, 1), B (out, r)."""
    return e[:, 0] + a.mean(dim=1) + b.mean(dim=0)


def most_important(scores: Sequence[Tensor], count: int) -> list[Tensor]:
    """Which triplets to keep: the `count` most important ones over all layers, exactly.

    Among equals the earlier layer wins, and in a layer the earlier triplet, so that every process
    of a distributed run chooses the same. A score that is NaN counts as the least.

    Args:
        scores: per layer (r,), on any devices.
        count: from 0 to the number of all triplets.

    Returns:
        Per layer a bool tensor (r,) on the scores' device.
    """
    together = torch.cat([s.to("cpu", torch.float64) for s in scores]).nan_to_num(nan=-torch.inf)
    order = torch.argsort(together, descending=True, stable=True)
    keep = torch.zeros(len(together), dtype=torch.bool)
    keep[order[:count]] = True
    parts = torch.split(keep, [len(s) for s in scores])
    return [part.to(s.device) for part, s in zip(parts, scores, strict=True)]


def _chunks(weights: Sequence[Tensor]) -> Iterator[slice]:
    """Runs of consecutive tensors on one device, none much larger than the device's chunk."""
    start, size = 0, 0
    for end, weight in enumerate(weights):
        limit = _CHUNK.get(weight.device.type, _CHUNK["cuda"])
        if end > start and (
            size + weight.numel() > limit or weight.device != weights[start].device
        ):
            yield slice(start, end)
            start, size = end, 0
        size += weight.numel()
    if start < len(weights):
        yield slice(start, len(weights))

"""Honest allocators: scores, choices and penalties evaluated in other orders and dtypes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TypeVar

import torch
from torch import Tensor

from conformance.port import Port, load_port
from tests.mutants.honest import HonestLayer
from tests.mutants.honest_allocator import HonestAllocator, HonestPenalty
from tests.mutants.mutant import rank_port

ALLOCATORS: dict[str, Port] = {}
T = TypeVar("T", bound=type[HonestAllocator])


def allocator(name: str, penalty: type[HonestPenalty] = HonestPenalty) -> Callable[[T], T]:
    """Enter an honest allocator, and a penalty beside it."""

    def enter(variant: T) -> T:
        ALLOCATORS[name] = replace(rank_port(name, variant), penalty=penalty())
        return variant

    return enter


@allocator("the honest allocator")
class Honest(HonestAllocator):
    pass


class PenaltyInDouble(HonestPenalty):
    def gram(self, factor: Tensor) -> Tensor:
        return super().gram(factor.double())

    def combine(self, distances: Sequence[Tensor], layers: Sequence[HonestLayer]) -> Tensor:
        return super().combine(distances, layers).float()


@allocator("averages in fp64", PenaltyInDouble)
class InDouble(HonestAllocator):
    dtype = torch.float64


class PenaltyBackwards(HonestPenalty):
    """Products over the inner dimension from its end, outer product by outer product."""

    def gram(self, factor: Tensor) -> Tensor:
        gram = -torch.eye(len(factor))
        for column in factor.T.flip(0):
            gram = gram + column.outer(column)
        return gram

    def combine(self, distances: Sequence[Tensor], layers: Sequence[HonestLayer]) -> Tensor:
        total = distances[-1]
        for distance in reversed(distances[:-1]):
            total = total + distance
        return total / len(distances)


@allocator("sums backwards, one by one, and lets the later of equals in", PenaltyBackwards)
class Backwards(HonestAllocator):
    def triplets(self, a: Tensor, e: Tensor, b: Tensor) -> Tensor:
        total = torch.zeros(len(e))
        for column in b.flip(0):
            total = total + column * (1.0 / len(b))
        row = torch.zeros(len(e))
        for column in a.flip(1).T:
            row = row + column
        return (total + row / a.shape[1]) + e[:, 0]

    def choose(self, scores: Sequence[Tensor], budget: int) -> list[Tensor]:
        kept = super().choose([s.flip(0) for s in reversed(scores)], budget)
        return [k.flip(0) for k in reversed(kept)]


@allocator("interpolates, scales the gradient first, and finds the threshold first")
class Interpolates(HonestAllocator):
    def sensitivity(self, weight: Tensor, gradient: Tensor, scale: float) -> Tensor:
        return weight.abs() * (gradient / scale).abs()

    def smooth(self, old: Tensor, new: Tensor, beta: float) -> Tensor:
        return torch.lerp(old, new, 1.0 - beta)

    def choose(self, scores: Sequence[Tensor], budget: int) -> list[Tensor]:
        together = torch.cat(list(scores))
        if budget < len(together):
            threshold = torch.kthvalue(together, len(together) - budget + 1)[0]
            keep, tied = together > threshold, (together == threshold).nonzero()[:, 0]
            keep[tied[: budget - int(keep.sum())]] = True
        else:
            keep = torch.ones(len(together), dtype=torch.bool)
        return list(keep.split([len(s) for s in scores]))

    def mask(self, keep: Sequence[Tensor]) -> None:
        """By a product: what is masked may be a zero of either sign."""
        with torch.no_grad():
            for E, alive in zip(self.every("lora_E"), keep, strict=True):
                E.mul_(alive[:, None])


@allocator("measures uncertainty from the old mean, which is 1 / beta1 times as far")
class FromOldMean(HonestAllocator):
    """now - new mean = beta1 (now - old mean): every score is larger by the same factor."""

    def deviation(self, now: Tensor, mean: Tensor, old: Tensor) -> Tensor:
        return (now - old).abs()


# The allocator that this project ships: fused averages, a choice in fp64 on the CPU.
ALLOCATORS["qsvd"] = load_port("qsvd")

"""Faults of an allocator's eyes: what it makes of weights and gradients, step by step."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from tests.mutants.honest_allocator import HonestAllocator
from tests.mutants.mutant import rank_mutant


@rank_mutant("forgets the weight in a sensitivity", kills=("RANK-1", "RANK-4"), kind="arithmetic")
class ForgetsWeight(HonestAllocator):
    def sensitivity(self, weight: Tensor, gradient: Tensor, scale: float) -> Tensor:
        return (gradient / scale).abs()


@rank_mutant("keeps the sign of a sensitivity", kills=("RANK-1", "RANK-7"), kind="arithmetic")
class KeepsSign(HonestAllocator):
    def sensitivity(self, weight: Tensor, gradient: Tensor, scale: float) -> Tensor:
        return weight * gradient / scale


@rank_mutant("squares a sensitivity", kills=("RANK-1", "RANK-2"), kind="arithmetic")
class SquaresSensitivity(HonestAllocator):
    def sensitivity(self, weight: Tensor, gradient: Tensor, scale: float) -> Tensor:
        return super().sensitivity(weight, gradient, scale) ** 2


@rank_mutant("computes a sensitivity in bf16", kills=("RANK-1", "RANK-4"), kind="dtype")
class HalfSensitivity(HonestAllocator):
    def sensitivity(self, weight: Tensor, gradient: Tensor, scale: float) -> Tensor:
        return (weight.bfloat16() * gradient.bfloat16() / scale).abs().float()


@rank_mutant("smooths sensitivities with beta2", kills=("RANK-2",), kind="arithmetic")
class SmoothsMeanWithBeta2(HonestAllocator):
    def smooth_mean(self, old: Tensor, new: Tensor) -> Tensor:
        return self.smooth(old, new, self.config.beta2)


@rank_mutant("smooths sensitivities with 1 - beta1", kills=("RANK-2",), kind="arithmetic")
class SmoothsMeanBackwards(HonestAllocator):
    def smooth_mean(self, old: Tensor, new: Tensor) -> Tensor:
        return self.smooth(old, new, 1 - self.config.beta1)


@rank_mutant("remembers the last sensitivity alone", kills=("RANK-2", "RANK-3"), kind="state")
class LastSensitivity(HonestAllocator):
    def smooth_mean(self, old: Tensor, new: Tensor) -> Tensor:
        return (1 - self.config.beta1) * new


@rank_mutant("adds sensitivities up", kills=("RANK-2",), kind="arithmetic")
class AddsUp(HonestAllocator):
    def smooth_mean(self, old: Tensor, new: Tensor) -> Tensor:
        return self.config.beta1 * old + new


@rank_mutant("starts the mean at the first sensitivity", kills=("RANK-2",), kind="initialisation")
class StartsAtFirst(HonestAllocator):
    def average(self, key: str, now: Tensor) -> None:
        self.means.setdefault(key, now)
        super().average(key, now)


@rank_mutant("smooths uncertainties with beta1", kills=("RANK-3",), kind="arithmetic")
class SmoothsUncertaintyWithBeta1(HonestAllocator):
    def smooth_uncertainty(self, old: Tensor, new: Tensor) -> Tensor:
        return self.smooth(old, new, self.config.beta1)


@rank_mutant("squares the deviation", kills=("RANK-3",), kind="arithmetic")
class SquaresDeviation(HonestAllocator):
    def deviation(self, now: Tensor, mean: Tensor, old: Tensor) -> Tensor:
        return (now - mean) ** 2


@rank_mutant("keeps the sign of a deviation", kills=("RANK-3",), kind="arithmetic")
class SignedDeviation(HonestAllocator):
    def deviation(self, now: Tensor, mean: Tensor, old: Tensor) -> Tensor:
        return now - mean


@rank_mutant("leaves the uncertainty out", kills=("RANK-1", "RANK-3", "RANK-4"), kind="arithmetic")
class CertainOfItself(HonestAllocator):
    def score(self, mean: Tensor, uncertainty: Tensor) -> Tensor:
        return mean


@rank_mutant("adds mean and uncertainty", kills=("RANK-2", "RANK-3"), kind="arithmetic")
class AddsUncertainty(HonestAllocator):
    def score(self, mean: Tensor, uncertainty: Tensor) -> Tensor:
        return mean + uncertainty


@rank_mutant("sums over the row of A", kills=("RANK-4",), kind="broadcasting")
class SumsOverA(HonestAllocator):
    def triplets(self, a: Tensor, e: Tensor, b: Tensor) -> Tensor:
        return e[:, 0] + a.sum(1) + b.mean(0)


@rank_mutant("forgets B in the importance", kills=("RANK-4", "RANK-7"), kind="arithmetic")
class ForgetsB(HonestAllocator):
    def triplets(self, a: Tensor, e: Tensor, b: Tensor) -> Tensor:
        return e[:, 0] + a.mean(1)


@rank_mutant("means over A and B together", kills=("RANK-4",), kind="broadcasting")
class MeansTogether(HonestAllocator):
    def triplets(self, a: Tensor, e: Tensor, b: Tensor) -> Tensor:
        return e[:, 0] + torch.cat([a, b.T], 1).mean(1)


@rank_mutant("takes the largest of a row", kills=("RANK-4",), kind="arithmetic")
class TakesLargest(HonestAllocator):
    def triplets(self, a: Tensor, e: Tensor, b: Tensor) -> Tensor:
        return e[:, 0] + a.amax(1) + b.amax(0)


@rank_mutant("counts padding of A to 16 columns", kills=("RANK-4",), kind="boundary")
class CountsPadding(HonestAllocator):
    def triplets(self, a: Tensor, e: Tensor, b: Tensor) -> Tensor:
        padded = torch.nn.functional.pad(a, (0, -a.shape[1] % 16))
        return e[:, 0] + padded.mean(1) + b.mean(0)


@rank_mutant("takes a missing gradient for zero", kills=("RANK-11",), kind="boundary")
class MissingIsZero(HonestAllocator):
    def gradient(self, key: str, weight: Tensor) -> Tensor:
        return torch.zeros_like(weight) if weight.grad is None else weight.grad


@rank_mutant("raises where a gradient is missing", kills=("RANK-11",), kind="boundary")
class RaisesWhereMissing(HonestAllocator):
    def gradient(self, key: str, weight: Tensor) -> Tensor:
        assert weight.grad is not None
        return weight.grad


@rank_mutant("skips the step if a gradient is missing", kills=("RANK-11",), kind="boundary")
class SkipsStepIfMissing(HonestAllocator):
    def usable(self, gradients: Mapping[str, Tensor | None]) -> bool:
        return None not in gradients.values() and super().usable(gradients)


@rank_mutant(
    "averages the last gradient again where one is missing", kills=("RANK-11",), kind="state"
)
class RepeatsGradient(HonestAllocator):
    def gradient(self, key: str, weight: Tensor) -> Tensor | None:
        seen: dict[str, Tensor] = self.__dict__.setdefault("seen", {})
        if weight.grad is not None:
            seen[key] = weight.grad.clone()
        return seen.get(key)


@rank_mutant("observes every micro-batch", kills=("RANK-12",), kind="autograd")
class ObservesMicroBatches(HonestAllocator):
    """Gradients as they arrive, in absolute value; without a backward it sees what there is."""

    def __init__(self, model: nn.Module, config: Any, adapter_name: str) -> None:
        super().__init__(model, config, adapter_name)
        self.arrived: dict[str, Tensor] = {}
        for key, weight in self.weights().items():
            weight.register_hook(lambda gradient, key=key: self.arrive(key, gradient))

    def arrive(self, key: str, gradient: Tensor) -> None:
        self.arrived[key] = self.arrived.get(key, torch.zeros_like(gradient)) + gradient.abs()

    def gradient(self, key: str, weight: Tensor) -> Tensor | None:
        return self.arrived.pop(key, weight.grad)


@rank_mutant("observes the last micro-batch alone", kills=("RANK-12",), kind="autograd")
class LastMicroBatch(ObservesMicroBatches):
    def arrive(self, key: str, gradient: Tensor) -> None:
        self.arrived[key] = gradient.clone()


@rank_mutant("lets the loss scale in", kills=("RANK-13",), kind="arithmetic")
class LetsScaleIn(HonestAllocator):
    def sensitivity(self, weight: Tensor, gradient: Tensor, scale: float) -> Tensor:
        return super().sensitivity(weight, gradient, 1.0)


@rank_mutant("divides by the first loss scale for good", kills=("RANK-13",), kind="state")
class FirstScale(HonestAllocator):
    def observe(self, scale: float) -> None:
        super().observe(self.__dict__.setdefault("scale", scale))


@rank_mutant("multiplies by the loss scale", kills=("RANK-13",), kind="arithmetic")
class MultipliesByScale(HonestAllocator):
    def sensitivity(self, weight: Tensor, gradient: Tensor, scale: float) -> Tensor:
        return super().sensitivity(weight, gradient, 1.0 / scale)


@rank_mutant("averages an overflow in", kills=("RANK-14",), kind="boundary")
class AveragesOverflow(HonestAllocator):
    def usable(self, gradients: Mapping[str, Tensor | None]) -> bool:
        return True


@rank_mutant(
    "looks for infinities and not for NaN", kills=("RANK-14",), kind="boundary", only="NaN"
)
class OverlooksNaN(HonestAllocator):
    def usable(self, gradients: Mapping[str, Tensor | None]) -> bool:
        return not any(bool(g.isinf().any()) for g in gradients.values() if g is not None)


@rank_mutant("takes an overflow for a gradient of zero", kills=("RANK-14",), kind="boundary")
class OverflowIsZero(AveragesOverflow):
    def gradient(self, key: str, weight: Tensor) -> Tensor | None:
        return None if weight.grad is None else weight.grad.nan_to_num(0.0, 0.0, 0.0)


@rank_mutant("skips only the weight that overflowed", kills=("RANK-14",), kind="boundary")
class SkipsWeight(HonestAllocator):
    def gradient(self, key: str, weight: Tensor) -> Tensor | None:
        overflowed = weight.grad is not None and not bool(weight.grad.isfinite().all())
        return None if overflowed else weight.grad

"""The honest allocator and penalty in plain torch: a short method for each thing that a mutant gets wrong."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tests.mutants.honest import HonestLayer

PARTS = ("lora_A", "lora_E", "lora_B")


@dataclass
class HonestConfig:
    """The fields of a schedule and of the averages, by PEFT's names."""

    total_step: int
    init_r: int
    target_r: int
    tinit: int
    tfinal: int
    deltaT: int
    beta1: float
    beta2: float

    @property
    def settled(self) -> int:
        return self.total_step - self.tfinal


class HonestAllocator:
    """Keeps the budget's number of triplets, the most important ones, as chapter RANK of SPEC.md says."""

    dtype = torch.float32

    def __init__(self, model: nn.Module, config: HonestConfig, adapter_name: str) -> None:
        self.config, self.adapter = config, adapter_name
        self.layers = [m for m in model.modules() if isinstance(m, HonestLayer)]
        self.layers = [layer for layer in self.layers if self.adapters_of(layer)]
        self.initial = sum(len(E) for E in self.every("lora_E"))
        self.means: dict[str, Tensor] = {}
        self.uncertainties: dict[str, Tensor] = {}
        self.keep: list[Tensor] | None = None

    @torch.no_grad()
    def step(self, global_step: int, grad_scale: float = 1.0) -> int:
        if self.observes(global_step):
            self.observe(grad_scale)
        budget = self.budget(global_step)
        if self.allocates(global_step):
            self.keep = self.choose(self.scores(), budget)
            self.mask(self.keep)
        elif self.keep is not None and global_step > self.config.settled:
            self.mask(self.keep)
        return budget

    # --- finding weights ------------------------------------------------------------------------

    def adapters_of(self, layer: HonestLayer) -> list[str]:
        """The names, of those that the layer has, which are allocated."""
        return [name for name in layer.lora_A if name == self.adapter]

    def every(self, part: str) -> list[Tensor]:
        """One part of every layer."""
        return [
            getattr(layer, part)[name] for layer in self.layers for name in self.adapters_of(layer)
        ]

    def weights(self) -> dict[str, Tensor]:
        return {
            f"{index}.{part}": weight
            for part in PARTS
            for index, weight in enumerate(self.every(part))
        }

    # --- importance -----------------------------------------------------------------------------

    def observes(self, step: int) -> bool:
        return step < self.config.settled

    def observe(self, scale: float) -> None:
        """Move the averages of every weight that has a gradient, unless one of those overflowed."""
        gradients = {key: self.gradient(key, w) for key, w in self.weights().items()}
        found = {key: g for key, g in gradients.items() if g is not None}
        if not self.usable(gradients):
            return
        for key, gradient in found.items():
            self.average(key, self.sensitivity(self.weights()[key], gradient, scale))

    def gradient(self, key: str, weight: Tensor) -> Tensor | None:
        return weight.grad

    def usable(self, gradients: Mapping[str, Tensor | None]) -> bool:
        return all(bool(g.isfinite().all()) for g in gradients.values() if g is not None)

    def sensitivity(self, weight: Tensor, gradient: Tensor, scale: float) -> Tensor:
        return (weight.to(self.dtype) * gradient.to(self.dtype) / scale).abs()

    def average(self, key: str, now: Tensor) -> None:
        old, zero = self.means.get(key), torch.zeros_like(now)
        mean = self.smooth_mean(zero if old is None else old, now)
        deviation = self.deviation(now, mean, zero if old is None else old)
        self.means[key] = mean
        self.uncertainties[key] = self.smooth_uncertainty(
            self.uncertainties.get(key, zero), deviation
        )

    def smooth_mean(self, old: Tensor, new: Tensor) -> Tensor:
        return self.smooth(old, new, self.config.beta1)

    def smooth_uncertainty(self, old: Tensor, new: Tensor) -> Tensor:
        return self.smooth(old, new, self.config.beta2)

    def smooth(self, old: Tensor, new: Tensor, beta: float) -> Tensor:
        return beta * old + (1 - beta) * new

    def deviation(self, now: Tensor, mean: Tensor, old: Tensor) -> Tensor:
        return (now - mean).abs()

    def scores(self) -> list[Tensor]:
        """S (r,) of every layer."""
        zero = {key: torch.zeros_like(w, dtype=self.dtype) for key, w in self.weights().items()}
        means, uncertainties = {**zero, **self.means}, {**zero, **self.uncertainties}
        return [
            self.triplets(*(self.score(means[k], uncertainties[k]) for k in keys))
            for keys in ([f"{index}.{part}" for part in PARTS] for index in range(len(self.layers)))
        ]

    def score(self, mean: Tensor, uncertainty: Tensor) -> Tensor:
        return mean * uncertainty

    def triplets(self, a: Tensor, e: Tensor, b: Tensor) -> Tensor:
        """a (r, in), e (r, 1), b (out, r) to S (r,)."""
        return e[:, 0] + a.mean(1) + b.mean(0)

    # --- budget and masks -----------------------------------------------------------------------

    def target(self) -> int:
        return self.config.target_r * len(self.layers)

    def budget(self, step: int) -> int:
        start, end, target = self.config.tinit, self.config.settled, self.target()
        if step <= start:
            return self.initial
        if step >= end:
            return target
        return self.falling(self.initial - target, (step - start) / (end - start), target)

    def falling(self, height: int, progress: float, target: int) -> int:
        return int(height * (1 - progress) ** 3 + target)

    def allocates(self, step: int) -> bool:
        if step == self.config.settled:
            return True
        return self.config.tinit < step < self.config.settled and step % self.config.deltaT == 0

    def choose(self, scores: Sequence[Tensor], budget: int) -> list[Tensor]:
        """Masks (r,) that keep the most important ones of all layers; the earlier of equals."""
        together = torch.cat(list(scores))
        keep = torch.zeros(len(together), dtype=torch.bool)
        keep[together.argsort(descending=True, stable=True)[:budget]] = True
        return list(keep.split([len(s) for s in scores]))

    @torch.no_grad()
    def mask(self, keep: Sequence[Tensor]) -> None:
        for E, alive in zip(self.every("lora_E"), keep, strict=True):
            E.masked_fill_(~alive[:, None], 0.0)

    # --- state ----------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        return {"means": self.means, "uncertainties": self.uncertainties, "keep": self.keep}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for name, value in copy.deepcopy(dict(state)).items():
            setattr(self, name, value)


class HonestPenalty:
    """Mean of ||F F^T - I||_F over the factors of one adapter: a port's `orthogonal_penalty`."""

    def __call__(self, model: nn.Module, adapter_name: str) -> Tensor:
        layers = [m for m in model.modules() if isinstance(m, HonestLayer)]
        factors = [
            factor
            for layer in layers
            for name in layer.lora_A
            if self.wanted(name, adapter_name)
            for factor in self.factors(layer, name)
        ]
        return self.combine([self.distance(self.gram(f)) for f in factors], layers)

    def wanted(self, name: str, adapter: str) -> bool:
        return name == adapter

    def factors(self, layer: HonestLayer, name: str) -> list[Tensor]:
        """F (r, n): A, and B transposed."""
        return [layer.lora_A[name], layer.lora_B[name].T]

    def gram(self, factor: Tensor) -> Tensor:
        return factor @ factor.T - torch.eye(len(factor), dtype=factor.dtype)

    def distance(self, gram: Tensor) -> Tensor:
        return torch.linalg.matrix_norm(gram)

    def combine(self, distances: Sequence[Tensor], layers: Sequence[HonestLayer]) -> Tensor:
        return torch.stack(list(distances)).mean()

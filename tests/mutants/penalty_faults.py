"""Faults of the orthogonal penalty."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from tests.mutants.honest import HonestLayer
from tests.mutants.honest_allocator import HonestPenalty
from tests.mutants.mutant import rank_mutant, tampered


@rank_mutant("squares the norm, as the paper does", kills=("RANK-20", "RANK-21"), kind="arithmetic")
class SquaresNorm(HonestPenalty):
    def distance(self, gram: Tensor) -> Tensor:
        return (gram * gram).sum()


@rank_mutant("sums the distances", kills=("RANK-20", "RANK-21"), kind="arithmetic")
class SumsDistances(HonestPenalty):
    def combine(self, distances: Sequence[Tensor], layers: Sequence[HonestLayer]) -> Tensor:
        return torch.stack(list(distances)).sum()


@rank_mutant("divides by the number of layers", kills=("RANK-20",), kind="arithmetic")
class MeanOverLayers(HonestPenalty):
    def combine(self, distances: Sequence[Tensor], layers: Sequence[HonestLayer]) -> Tensor:
        return torch.stack(list(distances)).sum() / len(layers)


@rank_mutant("means over A alone", kills=("RANK-20", "RANK-21"), kind="arithmetic")
class OfAAlone(HonestPenalty):
    def factors(self, layer: HonestLayer, name: str) -> list[Tensor]:
        return [layer.lora_A[name]]


@rank_mutant("compares B B^T with the identity", kills=("RANK-20",), kind="broadcasting")
class WrongSideOfB(HonestPenalty):
    def factors(self, layer: HonestLayer, name: str) -> list[Tensor]:
        return [layer.lora_A[name], layer.lora_B[name]]


@rank_mutant("forgets the identity", kills=("RANK-20", "RANK-21"), kind="arithmetic")
class ForgetsIdentity(HonestPenalty):
    def gram(self, factor: Tensor) -> Tensor:
        return factor @ factor.T


@rank_mutant("computes the penalty in bf16", kills=("RANK-20",), kind="dtype")
class HalfPenalty(HonestPenalty):
    def gram(self, factor: Tensor) -> Tensor:
        return super().gram(factor.bfloat16()).float()


@rank_mutant(
    "has a NaN for a gradient where factors are orthonormal",
    kills=("RANK-21",),
    kind="autograd",
    only="NaN",
)
class SlopeOfRoot(HonestPenalty):
    """sqrt has no slope at zero."""

    def distance(self, gram: Tensor) -> Tensor:
        return (gram * gram).sum().sqrt()


@rank_mutant("penalises without a gradient", kills=("RANK-21",), kind="autograd")
class Detached(HonestPenalty):
    def factors(self, layer: HonestLayer, name: str) -> list[Tensor]:
        return [f.detach().requires_grad_() for f in super().factors(layer, name)]


@rank_mutant("has half the gradient in B", kills=("RANK-21",), kind="autograd", only="backward")
class HalfInB(HonestPenalty):
    def factors(self, layer: HonestLayer, name: str) -> list[Tensor]:
        A, B = super().factors(layer, name)
        return [A, tampered(B, lambda gradient: gradient / 2)]


@rank_mutant("pulls at E", kills=("RANK-21",), kind="autograd", only="backward")
class PullsAtE(HonestPenalty):
    def factors(self, layer: HonestLayer, name: str) -> list[Tensor]:
        A, B = super().factors(layer, name)
        E = layer.lora_E[name]
        return [A + (E - E.detach()), B]


@rank_mutant("penalises adapters whose names contain its own", kills=("RANK-22",), kind="adapters")
class PenalisesOthers(HonestPenalty):
    def wanted(self, name: str, adapter: str) -> bool:
        return adapter in name


@rank_mutant("penalises every adapter", kills=("RANK-22",), kind="adapters")
class PenalisesAll(HonestPenalty):
    def wanted(self, name: str, adapter: str) -> bool:
        return True


@rank_mutant("penalises the adapter that came last", kills=("RANK-22",), kind="adapters")
class PenalisesLast(HonestPenalty):
    def __call__(self, model: nn.Module, adapter_name: str) -> Tensor:
        layer = next(m for m in model.modules() if isinstance(m, HonestLayer))
        return super().__call__(model, list(layer.lora_A)[-1])

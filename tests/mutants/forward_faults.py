"""Mutants of chapter FWD: arithmetic, shapes, rows, and what the layer must leave alone."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import linear

from tests.mutants.honest import HonestLayer
from tests.mutants.mutant import mutant


@mutant("adds nothing", kills=("FWD-1", "FWD-3", "FWD-12", "GRAD-6"), kind="arithmetic")
class AddsNothing(HonestLayer):
    def combine(self, y: Tensor, delta: Tensor) -> Tensor:
        return y + 0.0 * delta.to(y.dtype)


@mutant("subtracts the update", kills=("FWD-1", "FWD-2", "FWD-3", "FWD-7"), kind="arithmetic")
class Subtracts(HonestLayer):
    def combine(self, y: Tensor, delta: Tensor) -> Tensor:
        return y - delta.to(y.dtype)


@mutant("is off by one part in ten thousand", kills=("FWD-1", "FWD-2"), kind="arithmetic")
class SlightlyOff(HonestLayer):
    def factor(self, name: str) -> Tensor:
        return super().factor(name) * 1.0001


@mutant("rounds the hidden vector to bf16", kills=("FWD-1",), kind="dtype")
class RoundsHidden(HonestLayer):
    def product(self, x: Tensor, A: Tensor, E: Tensor, B: Tensor) -> Tensor:
        return linear(linear(x, A * E).bfloat16().float(), B)


@mutant("forgets the last rank", kills=("FWD-1", "FWD-2", "FWD-3"), kind="arithmetic")
class ForgetsLastRank(HonestLayer):
    def product(self, x: Tensor, A: Tensor, E: Tensor, B: Tensor) -> Tensor:
        return super().product(x, A[:-1], E[:-1], B[:, :-1])


@mutant("rolls the singular values by one rank", kills=("FWD-1", "FWD-3"), kind="broadcasting")
class RollsE(HonestLayer):
    def triplets(self, name: str) -> tuple[Tensor, Tensor, Tensor]:
        A, E, B = super().triplets(name)
        return A, E.roll(1, 0), B


@mutant(
    "scales all ranks by the first singular value",
    kills=("FWD-1", "FWD-2", "FWD-3"),
    kind="broadcasting",
)
class BroadcastsFirstE(HonestLayer):
    def triplets(self, name: str) -> tuple[Tensor, Tensor, Tensor]:
        A, E, B = super().triplets(name)
        return A, E[:1].expand_as(E), B


@mutant(
    "applies the singular values twice",
    kills=("FWD-1", "FWD-2", "FWD-3", "FWD-7"),
    kind="arithmetic",
)
class SquaresE(HonestLayer):
    def triplets(self, name: str) -> tuple[Tensor, Tensor, Tensor]:
        A, E, B = super().triplets(name)
        return A * E, E, B


@mutant(
    "applies no singular values", kills=("FWD-1", "FWD-5", "FWD-7", "INIT-1"), kind="arithmetic"
)
class NoE(HonestLayer):
    def product(self, x: Tensor, A: Tensor, E: Tensor, B: Tensor) -> Tensor:
        return linear(linear(x, A + 0.0 * E), B)


@mutant(
    "takes the absolute value of E", kills=("FWD-2", "FWD-7"), kind="arithmetic", only="negative E"
)
class AbsoluteE(HonestLayer):
    def triplets(self, name: str) -> tuple[Tensor, Tensor, Tensor]:
        A, E, B = super().triplets(name)
        return A, E.abs(), B


@mutant("masks negative singular values", kills=("FWD-7",), kind="arithmetic", only="negative E")
class MasksNegativeE(HonestLayer):
    def triplets(self, name: str) -> tuple[Tensor, Tensor, Tensor]:
        A, E, B = super().triplets(name)
        return A, E.clamp(min=0.0), B


@mutant(
    "clamps large singular values",
    kills=("FWD-1", "DTYPE-4"),
    kind="arithmetic",
    only="large values",
)
class ClampsE(HonestLayer):
    def triplets(self, name: str) -> tuple[Tensor, Tensor, Tensor]:
        A, E, B = super().triplets(name)
        return A, E.clamp(-0.5, 0.5), B


@mutant(
    "is off by a thousandth in the base layer's output",
    kills=("FWD-4", "FWD-5", "FWD-6"),
    kind="arithmetic",
)
class ScalesBase(HonestLayer):
    def base_output(self, x: Tensor) -> Tensor:
        return super().base_output(x) * 1.001


@mutant(
    "is off by one percent in a corner of the weight", kills=("FWD-4", "DROP-5"), kind="arithmetic"
)
class CornerOfTheWeight(HonestLayer):
    def base_output(self, x: Tensor) -> Tensor:
        y = super().base_output(x)
        return torch.cat([y[..., :1] * 1.01, y[..., 1:]], dim=-1)


@mutant("keeps E away from zero", kills=("FWD-5", "GRAD-7"), kind="arithmetic")
class NudgesE(HonestLayer):
    def triplets(self, name: str) -> tuple[Tensor, Tensor, Tensor]:
        A, E, B = super().triplets(name)
        return A, E + 1e-6, B


@mutant("returns zeros for rank zero", kills=("FWD-6",), kind="boundary", only="rank zero")
class RankZero(HonestLayer):
    def combine(self, y: Tensor, delta: Tensor) -> Tensor:
        empty = all(self.r[name] == 0 for name in self.active_adapters)
        return torch.zeros_like(y) if empty else super().combine(y, delta)


@mutant("squeezes leading dimensions of one", kills=("FWD-8",), kind="broadcasting")
class Squeezes(HonestLayer):
    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return y.squeeze(0) if y.dim() > 1 else y


@mutant("flattens the leading dimensions", kills=("FWD-8",), kind="broadcasting")
class Flattens(HonestLayer):
    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return y.flatten(0, -2) if y.dim() > 2 else y


@mutant("needs two dimensions", kills=("FWD-8",), kind="broadcasting")
class NeedsTwoDimensions(HonestLayer):
    def product(self, x: Tensor, A: Tensor, E: Tensor, B: Tensor) -> Tensor:
        return torch.einsum("...ni,ri,mr->...nm", x, A * E, B)


@mutant(
    "reduces over an empty batch", kills=("FWD-9", "GRAD-18"), kind="boundary", only="empty batch"
)
class LooksAtTheMaximum(HonestLayer):
    def delta(self, x: Tensor, name: str) -> Tensor:
        return super().delta(x, name) * (x.detach().max() > -1e30)


@mutant(
    "reads x as if it were contiguous", kills=("FWD-10",), kind="aliasing", only="non-contiguous x"
)
class AssumesContiguous(HonestLayer):
    def dropped(self, x: Tensor, name: str) -> Tensor:
        strides = torch.empty(x.shape, device="meta").stride()
        return super().dropped(x.as_strided(x.shape, strides), name)


@mutant(
    "reads x from the start of its storage",
    kills=("FWD-10",),
    kind="aliasing",
    only="non-contiguous x",
)
class IgnoresOffset(HonestLayer):
    def dropped(self, x: Tensor, name: str) -> Tensor:
        return super().dropped(x.as_strided(x.shape, x.stride(), 0), name)


@mutant("scales x in place", kills=("FWD-11", "GRAD-1"), kind="aliasing")
class WritesIntoX(HonestLayer):
    def delta(self, x: Tensor, name: str) -> Tensor:
        delta = super().delta(x, name)
        x.detach().mul_(1.5)
        return delta


@mutant("writes into the incoming gradient", kills=("FWD-11",), kind="aliasing", only="backward")
class WritesIntoGradient(HonestLayer):
    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        if y.requires_grad:
            y.register_hook(lambda g: g.mul_(2.0).div(2.0))
        return y


@mutant("adds into the base layer's output", kills=("FWD-12",), kind="aliasing")
class AddsInPlace(HonestLayer):
    def combine(self, y: Tensor, delta: Tensor) -> Tensor:
        result = y + delta.to(y.dtype)
        y.detach().copy_(result.detach())
        return result


@mutant("scales the bias for good", kills=("FWD-13", "INIT-5"), kind="state")
class ScalesBias(HonestLayer):
    def adopt(self, base: torch.nn.Module) -> None:
        super().adopt(base)
        if isinstance(base.bias, Tensor):
            base.bias.data.mul_(1.25)

    def forward(self, x: Tensor) -> Tensor:
        if self.base_layer.bias is not None:
            self.base_layer.bias.data.mul_(1.25)
        return super().forward(x)


@mutant(
    "centres the update over the batch",
    kills=("FWD-1", "FWD-14", "FWD-15", "FWD-16"),
    kind="broadcasting",
)
class NormalisesOverRows(HonestLayer):
    def delta(self, x: Tensor, name: str) -> Tensor:
        delta = super().delta(x, name)
        return delta - 0.01 * delta.mean(0, keepdim=True) if delta.dim() > 1 else delta


@mutant(
    "multiplies the neighbouring rows by zero", kills=("FWD-15",), kind="broadcasting", only="NaN"
)
class ZeroTimesNeighbour(HonestLayer):
    def delta(self, x: Tensor, name: str) -> Tensor:
        delta = super().delta(x, name)
        return delta + 0.0 * delta.flip(0)


@mutant(
    "scales by the largest element of the batch", kills=("FWD-15",), kind="broadcasting", only="NaN"
)
class ScalesByTheBatch(HonestLayer):
    def product(self, x: Tensor, A: Tensor, E: Tensor, B: Tensor) -> Tensor:
        largest = x.detach().abs().max().clamp(min=1.0) if x.numel() else 1.0
        return super().product(x / largest, A, E, B) * largest

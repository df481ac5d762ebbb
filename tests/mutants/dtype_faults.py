"""Mutants of chapter DTYPE: which dtype comes out, what is computed in between, and torch's global state."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from tests.mutants.honest import HonestLayer
from tests.mutants.mutant import mutant


@mutant("returns fp32", kills=("DTYPE-1",), kind="dtype")
class ReturnsFloat(HonestLayer):
    def combine(self, y: Tensor, delta: Tensor) -> Tensor:
        return y.float() + delta


@mutant("returns fp32 from 33 rows on", kills=("DTYPE-1",), kind="dtype", only="33 rows")
class ReturnsFloatForManyRows(HonestLayer):
    def combine(self, y: Tensor, delta: Tensor) -> Tensor:
        return y.float() + delta if len(y) > 32 else super().combine(y, delta)


@mutant("returns x's dtype", kills=("DTYPE-2",), kind="dtype", only="autocast")
class ReturnsInputDtype(HonestLayer):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).to(x.dtype)


@mutant("returns the compute dtype", kills=("DTYPE-7",), kind="dtype")
class ReturnsComputeDtype(HonestLayer):
    def forward(self, x: Tensor) -> Tensor:
        dtype = getattr(self.base_layer, "compute_dtype", None) or x.dtype
        return super().forward(x).to(dtype)


@mutant("computes the update in the compute dtype", kills=("DTYPE-7",), kind="dtype")
class ComputesInComputeDtype(HonestLayer):
    def delta(self, x: Tensor, name: str) -> Tensor:
        dtype = getattr(self.base_layer, "compute_dtype", None) or x.dtype
        return super().delta(x.to(dtype), name).to(dtype)


@mutant(
    "casts its parameters with .half() and x to fp32", kills=("DTYPE-3", "DTYPE-5"), kind="dtype"
)
class FollowsHalf(HonestLayer):
    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> HonestLayer:
        return nn.Module._apply(self, fn, recurse)  # type: ignore[no-any-return, no-untyped-call]


@mutant("keeps half parameters after .half()", kills=("DTYPE-5",), kind="dtype")
class StaysHalf(HonestLayer):
    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> HonestLayer:
        return nn.Module._apply(self, fn, recurse)  # type: ignore[no-any-return, no-untyped-call]

    def triplets(self, name: str) -> tuple[Tensor, Tensor, Tensor]:
        A, E, B = super().triplets(name)
        return A.float(), E.float(), B.float()

    def factor(self, name: str) -> Tensor:
        return self.scaling[name] / (self.ranknum[name].float() + 1e-5)


@mutant(
    "casts to x's dtype before it divides by ranknum",
    kills=("DTYPE-4",),
    kind="dtype",
    only="large values",
)
class CastsBeforeScaling(HonestLayer):
    def product(self, x: Tensor, A: Tensor, E: Tensor, B: Tensor) -> Tensor:
        dtype = self.returned
        return linear(linear(x, A * E), B).to(dtype).float()

    def base_output(self, x: Tensor) -> Tensor:
        y = super().base_output(x)
        self.returned = y.dtype
        return y


@mutant(
    "casts to x's dtype before it divides by ranknum, from 33 rows on",
    kills=("DTYPE-4",),
    kind="dtype",
    only="33 rows",
)
class CastsManyRowsBeforeScaling(CastsBeforeScaling):
    def product(self, x: Tensor, A: Tensor, E: Tensor, B: Tensor) -> Tensor:
        cast = super().product if len(x) > 32 else super(CastsBeforeScaling, self).product
        return cast(x, A, E, B)


@mutant("leaves an fp32 gradient on a half x", kills=("DTYPE-6",), kind="dtype", only="backward")
class FloatGradient(HonestLayer):
    def forward(self, x: Tensor) -> Tensor:
        if not (x.is_leaf and x.requires_grad and x.dtype != torch.float32):
            return super().forward(x)
        leaf: Any = x
        leaf.grad_dtype = torch.float32
        return super().forward(x)


@mutant("accumulates in half precision", kills=("DTYPE-8",), kind="dtype")
class AccumulatesInHalf(HonestLayer):
    def product(self, x: Tensor, A: Tensor, E: Tensor, B: Tensor) -> Tensor:
        dtype = self.returned
        if dtype == torch.float32:
            return super().product(x, A, E, B)
        hidden = torch.zeros(*x.shape[:-1], len(A), dtype=dtype, device=x.device)
        for k in range(x.shape[-1]):
            hidden = hidden + (x[..., k : k + 1] * (A * E)[:, k]).to(dtype)
        return linear(hidden.float(), B)

    def base_output(self, x: Tensor) -> Tensor:
        y = super().base_output(x)
        self.returned = y.dtype
        return y


@mutant("sums ranks in half precision", kills=("DTYPE-8",), kind="dtype")
class SumsRanksInHalf(AccumulatesInHalf):
    def product(self, x: Tensor, A: Tensor, E: Tensor, B: Tensor) -> Tensor:
        dtype = self.returned
        if dtype == torch.float32:
            return HonestLayer.product(self, x, A, E, B)
        hidden = linear(x, A * E)
        total = torch.zeros(*x.shape[:-1], len(B), dtype=dtype, device=x.device)
        for j in range(len(A)):
            total = total + (hidden[..., j : j + 1] * B[:, j]).to(dtype)
        return total.float()


@mutant("scales otherwise under autocast", kills=("DTYPE-2",), kind="dtype", only="autocast")
class OtherUnderAutocast(HonestLayer):
    def delta(self, x: Tensor, name: str) -> Tensor:
        autocast = torch.is_autocast_enabled(x.device.type)
        return super().delta(x, name) * (1.05 if autocast else 1.0)


@mutant("sets torch's default dtype", kills=("DTYPE-9",), kind="state")
class SetsDefaultDtype(HonestLayer):
    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        torch.set_default_dtype(torch.float64)
        return y


@mutant("leaves autocast on", kills=("DTYPE-9",), kind="state")
class LeavesAutocastOn(HonestLayer):
    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        torch.set_autocast_enabled(x.device.type, True)
        return y


@mutant("computes on one thread for good", kills=("DTYPE-9",), kind="state")
class SetsThreads(HonestLayer):
    def forward(self, x: Tensor) -> Tensor:
        torch.set_num_threads(torch.get_num_threads() % 2 + 1)
        return super().forward(x)

"""Mutants of chapter GRAD: what flows back, how often, and to whom."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tests.mutants.honest import HonestLayer
from tests.mutants.mutant import mutant, tampered

Change = Callable[[Tensor], Tensor]


class _Tampers(HonestLayer):
    """Changes what flows back to the parameters; the forward is right."""

    def change(self, part: str, t: Tensor) -> Tensor:
        return t

    def triplets(self, name: str) -> tuple[Tensor, Tensor, Tensor]:
        A, E, B = super().triplets(name)
        return self.change("A", A), self.change("E", E), self.change("B", B)


@mutant(
    "x gets nothing through the adapter",
    kills=("GRAD-1", "GRAD-5", "GRAD-16"),
    kind="autograd",
    only="backward",
)
class DetachesX(HonestLayer):
    def delta(self, x: Tensor, name: str) -> Tensor:
        return super().delta(x.detach(), name)


@mutant(
    "x gets the adapter's part with the wrong sign",
    kills=("GRAD-1", "GRAD-5"),
    kind="autograd",
    only="backward",
)
class WrongSignToX(HonestLayer):
    def delta(self, x: Tensor, name: str) -> Tensor:
        return super().delta(tampered(x, torch.neg), name)


@mutant(
    "x gets nothing through the base layer",
    kills=("GRAD-1", "GRAD-7"),
    kind="autograd",
    only="backward",
)
class DetachesBase(HonestLayer):
    def base_output(self, x: Tensor) -> Tensor:
        return super().base_output(x).detach()


@mutant(
    "the gradient of A lacks a half",
    kills=("GRAD-2", "GRAD-5", "GRAD-16"),
    kind="autograd",
    only="backward",
)
class HalvesDA(_Tampers):
    def change(self, part: str, t: Tensor) -> Tensor:
        return tampered(t, lambda g: g / 2) if part == "A" else t


@mutant("the gradient of A lacks E", kills=("GRAD-2", "GRAD-15"), kind="autograd", only="backward")
class DAWithoutE(_Tampers):
    def triplets(self, name: str) -> tuple[Tensor, Tensor, Tensor]:
        A, E, B = super().triplets(name)
        return tampered(A, lambda g: torch.where(E == 0, 1.0, g / E)), E, B


@mutant(
    "the gradient of A is rounded to bf16",
    kills=("GRAD-2", "GRAD-19"),
    kind="autograd",
    only="backward",
)
class RoundsDA(_Tampers):
    def change(self, part: str, t: Tensor) -> Tensor:
        return tampered(t, lambda g: g.bfloat16().float()) if part == "A" else t


@mutant(
    "the gradient of E is doubled",
    kills=("GRAD-3", "GRAD-5", "GRAD-16"),
    kind="autograd",
    only="backward",
)
class DoublesDE(_Tampers):
    def change(self, part: str, t: Tensor) -> Tensor:
        return tampered(t, lambda g: g * 2) if part == "E" else t


@mutant(
    "the gradient of E is averaged over ranks", kills=("GRAD-3",), kind="autograd", only="backward"
)
class AveragesDE(_Tampers):
    def change(self, part: str, t: Tensor) -> Tensor:
        mean: Change = lambda g: g.mean(0, keepdim=True).expand_as(g)  # noqa: E731
        return tampered(t, mean) if part == "E" else t


@mutant(
    "the gradient of B is rolled by one output",
    kills=("GRAD-4", "GRAD-5"),
    kind="autograd",
    only="backward",
)
class RollsDB(_Tampers):
    def change(self, part: str, t: Tensor) -> Tensor:
        return tampered(t, lambda g: g.roll(1, 0)) if part == "B" else t


@mutant(
    "the gradient of B is off by one part in ten thousand",
    kills=("GRAD-4", "GRAD-16"),
    kind="autograd",
    only="backward",
)
class SlightlyOffDB(_Tampers):
    def change(self, part: str, t: Tensor) -> Tensor:
        return tampered(t, lambda g: g * 1.0001) if part == "B" else t


@mutant(
    "gradients are clipped at a tenth", kills=("GRAD-2", "GRAD-5"), kind="autograd", only="backward"
)
class Clips(_Tampers):
    def change(self, part: str, t: Tensor) -> Tensor:
        return tampered(t, lambda g: g.clamp(-0.1, 0.1))


@mutant(
    "gradients are averaged over the batch",
    kills=("GRAD-2", "GRAD-3", "GRAD-4"),
    kind="autograd",
    only="backward",
)
class AveragesOverRows(HonestLayer):
    def product(self, x: Tensor, A: Tensor, E: Tensor, B: Tensor) -> Tensor:
        rows = max(1, x.shape[:-1].numel())
        A, E, B = (tampered(t, lambda g: g / rows) for t in (A, E, B))
        return super().product(x, A, E, B)


@mutant("takes a short cut while E is zero", kills=("GRAD-6", "GRAD-15"), kind="masks")
class ShortCut(HonestLayer):
    def product(self, x: Tensor, A: Tensor, E: Tensor, B: Tensor) -> Tensor:
        live = (E != 0)[:, 0]
        return super().product(x, A[live], E[live], B[:, live])


@mutant("skips an adapter whose E is zero", kills=("GRAD-6",), kind="masks")
class SkipsZero(HonestLayer):
    def active(self) -> list[str]:
        return [n for n in self.active_adapters if bool(self.lora_E[n].any())]


@mutant("trains ranknum", kills=("GRAD-8", "SCALE-5", "STATE-8"), kind="state")
class TrainsRanknum(HonestLayer):
    def factor(self, name: str) -> Tensor:
        return self.scaling[name] / (self.ranknum[name] + self.epsilon)

    def set_adapter(self, names: Any) -> None:
        super().set_adapter(names)
        for ranknum in self.ranknum.values():
            ranknum.requires_grad_(True)


@mutant("overwrites gradients of before", kills=("GRAD-9",), kind="autograd", only="second call")
class Overwrites(HonestLayer):
    def forward(self, x: Tensor) -> Tensor:
        for parameter in self.lora_A.values():
            parameter.grad = None
        return super().forward(x)


@mutant(
    "computes something else without a graph",
    kills=("GRAD-10",),
    kind="autograd",
    only="checkpointing",
)
class OtherWithoutGraph(HonestLayer):
    def factor(self, name: str) -> Tensor:
        return super().factor(name) * (1.0 if torch.is_grad_enabled() else 1.0001)


@mutant(
    "forgets the update when it is recomputed",
    kills=("GRAD-10", "DROP-8"),
    kind="autograd",
    only="checkpointing",
)
class OffInRecomputation(_Tampers):
    def change(self, part: str, t: Tensor) -> Tensor:
        recomputing = torch._C._current_graph_task_id() != -1
        return tampered(t, lambda g: g * 0.5) if recomputing else t


@mutant(
    "reads the incoming gradient as if it were contiguous",
    kills=("GRAD-11",),
    kind="autograd",
    only="non-contiguous gradient",
)
class AssumesContiguousGradient(HonestLayer):
    def forward(self, x: Tensor) -> Tensor:
        def misread(g: Tensor) -> Tensor:
            strides = torch.empty(g.shape, device="meta").stride()
            return g.as_strided(g.shape, strides)

        return tampered(super().forward(x), misread)


@mutant(
    "keeps its parameters in the base layer's compute dtype",
    kills=("GRAD-12", "INIT-2"),
    kind="dtype",
)
class ParametersInHalf(HonestLayer):
    def reset(self, name: str, identity: bool) -> None:
        super().reset(name, identity)
        dtype = getattr(self.base_layer, "compute_dtype", torch.float32)
        for parameters in (self.lora_A, self.lora_E, self.lora_B):
            parameters[name].data = parameters[name].data.to(dtype)

    def triplets(self, name: str) -> tuple[Tensor, Tensor, Tensor]:
        A, E, B = super().triplets(name)
        return A.float(), E.float(), B.float()


@mutant("stores E as a row", kills=("GRAD-12", "INIT-2"), kind="broadcasting")
class StoresERow(HonestLayer):
    def reset(self, name: str, identity: bool) -> None:
        super().reset(name, identity)
        self.lora_E[name].data = self.lora_E[name].data.view(-1)

    def triplets(self, name: str) -> tuple[Tensor, Tensor, Tensor]:
        A, E, B = super().triplets(name)
        return A, E.view(-1, 1), B


@mutant("trains only where x requires a gradient", kills=("GRAD-13",), kind="autograd")
class NeedsXGradient(HonestLayer):
    def triplets(self, name: str) -> tuple[Tensor, Tensor, Tensor]:
        A, E, B = super().triplets(name)
        return (A, E, B) if self.wanted else (A.detach(), E.detach(), B.detach())

    def delta(self, x: Tensor, name: str) -> Tensor:
        self.wanted = x.requires_grad
        return super().delta(x, name)


@mutant("makes a graph under no_grad", kills=("GRAD-13", "DTYPE-9"), kind="state")
class EnablesGradients(HonestLayer):
    def forward(self, x: Tensor) -> Tensor:
        torch.set_grad_enabled(True)
        return super().forward(x)


class _SavesOutput(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor) -> Tensor:
        result = y.clone()
        ctx.kept = result.detach()
        ctx.copy = result.detach().clone()
        return result

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return torch.where(ctx.kept == ctx.copy, g, torch.zeros_like(g))


@mutant("looks at y again in backward", kills=("GRAD-14",), kind="aliasing")
class NeedsY(HonestLayer):
    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = _SavesOutput.apply(super().forward(x))  # type: ignore[no-untyped-call]
        return y


class _ReturnsView(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor) -> Tensor:
        return y.view(y.shape)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g


@mutant("returns a view that may not be written", kills=("GRAD-14",), kind="aliasing")
class ReturnsView(HonestLayer):
    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = _ReturnsView.apply(super().forward(x))  # type: ignore[no-untyped-call]
        return y


@mutant(
    "frees what a second backward needs",
    kills=("GRAD-17",),
    kind="autograd",
    only="second backward",
)
class FreesEarly(_Tampers):
    def change(self, part: str, t: Tensor) -> Tensor:
        seen: list[int] = []

        def once(g: Tensor) -> Tensor:
            seen.append(1)
            return g if len(seen) == 1 else torch.zeros_like(g)

        return tampered(t, once)


@mutant("returns early for an empty batch", kills=("GRAD-18",), kind="autograd", only="empty batch")
class ReturnsEarly(HonestLayer):
    def combine(self, y: Tensor, delta: Tensor) -> Tensor:
        return super().combine(y, delta) if y.numel() else y


@mutant("loses gradient of wide inputs", kills=("GRAD-19",), kind="autograd", only="large values")
class LosesWideGradients(_Tampers):
    def change(self, part: str, t: Tensor) -> Tensor:
        wide = part == "A" and t.shape[1] > 256
        return tampered(t, lambda g: g * (g.abs() > 1e-3 * g.abs().max())) if wide else t


@mutant("trains B only together with A", kills=("GRAD-26",), kind="autograd", only="backward")
class TrainsBWithA(HonestLayer):
    def triplets(self, name: str) -> tuple[Tensor, Tensor, Tensor]:
        A, E, B = super().triplets(name)
        return A, E, B if A.requires_grad else B.detach()


@mutant("trains what is frozen", kills=("GRAD-26",), kind="autograd")
class TrainsFrozen(HonestLayer):
    def triplets(self, name: str) -> tuple[Tensor, Tensor, Tensor]:
        self.lora_E[name].requires_grad_(name in self.active_adapters)
        return super().triplets(name)

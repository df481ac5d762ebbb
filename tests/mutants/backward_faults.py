"""More mutants of chapter GRAD: the forward is right, and one gradient is wrong."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tests.mutants.by_hand import ByHand, Part
from tests.mutants.honest import HonestLayer
from tests.mutants.mutant import mutant, tampered

PARTS: tuple[Part, ...] = ("x", "A", "E", "B")
Gradients = tuple[Tensor, Tensor, Tensor, Tensor]


class _OneGradient(ByHand):
    """A fault in the gradient of `part` alone."""

    part: Part

    def scaled(self, part: Part, name: str, c: Tensor) -> Tensor:
        return self.other_scale(name, c) if part == self.part else c

    def other_scale(self, name: str, c: Tensor) -> Tensor:
        return c


class _NoEpsilon(_OneGradient):
    def other_scale(self, name: str, c: Tensor) -> Tensor:
        return self.scaling[name] / self.ranknum[name].detach()


class _LargeEpsilon(_OneGradient):
    def other_scale(self, name: str, c: Tensor) -> Tensor:
        return self.scaling[name] / (self.ranknum[name].detach() + 1e-4)


class _Doubled(_OneGradient):
    def other_scale(self, name: str, c: Tensor) -> Tensor:
        return 2.0 * c


class _FirstForAll(_OneGradient):
    """The first rank's E (or dE) for all ranks."""

    def singular(self, part: Part, E: Tensor) -> Tensor:
        return E[:1].expand_as(E) if part == self.part else E

    def vjp(self, *arguments: Any) -> Gradients:
        dx, dA, dE, dB = super().vjp(*arguments)
        return dx, dA, dE[:1].expand_as(dE) if self.part == "E" else dE, dB


class _HalfOfTheRows(_OneGradient):
    """c for the first half of the ranks (or inputs, or outputs) only: a scalar taken for a vector."""

    def vjp(self, *arguments: Any) -> Gradients:
        gradients = dict(zip(PARTS, super().vjp(*arguments), strict=True))
        wrong = gradients[self.part].clone()
        wrong[len(wrong) // 2 :] *= 0.5
        return tuple({**gradients, self.part: wrong}[part] for part in PARTS)  # type: ignore[return-value]


for _fault, _what in (
    (_NoEpsilon, "lacks the 1e-5"),
    (_LargeEpsilon, "has 1e-4 for 1e-5"),
    (_Doubled, "has the scale twice"),
    (_FirstForAll, "has the first rank's singular value everywhere"),
    (_HalfOfTheRows, "is scaled in its first half only"),
):
    for _part in PARTS:
        _name = f"{_fault.__name__.strip('_')}InD{_part}"
        globals()[_name] = mutant(
            f"backward: the gradient of {_part} {_what}",
            kills=("GRAD-5", "GRAD-16"),
            kind="broadcasting" if _fault in (_FirstForAll, _HalfOfTheRows) else "autograd",
            only="backward",
        )(type(_name, (_fault,), {"part": _part, "__module__": __name__}))


class _InOneDtype(HonestLayer):
    """The gradient of A is a thousandth off for inputs of one dtype."""

    dtype: torch.dtype

    def delta(self, x: Tensor, name: str) -> Tensor:
        self.given = x.dtype
        return super().delta(x, name)

    def triplets(self, name: str) -> tuple[Tensor, Tensor, Tensor]:
        A, E, B = super().triplets(name)
        return (tampered(A, lambda g: g * 1.001) if self.given == self.dtype else A), E, B


@mutant(
    "the gradient of A is off in fp32", kills=("GRAD-5", "GRAD-2"), kind="autograd", only="fp32"
)
class OffInFloat(_InOneDtype):
    dtype = torch.float32


@mutant("the gradient of A is off in bf16", kills=("GRAD-5",), kind="autograd", only="bf16")
class OffInBfloat(_InOneDtype):
    dtype = torch.bfloat16


@mutant("the gradient of A is off in fp16", kills=("GRAD-5",), kind="autograd", only="fp16")
class OffInHalf(_InOneDtype):
    dtype = torch.float16


@mutant(
    "x gets no gradient over 4-bit layers",
    kills=("GRAD-1", "GRAD-5"),
    kind="autograd",
    only="4-bit",
)
class NoGradientOver4bit(HonestLayer):
    def delta(self, x: Tensor, name: str) -> Tensor:
        quantised = hasattr(self.base_layer, "compute_dtype")
        return super().delta(x.detach() if quantised else x, name)


@mutant(
    "E gets its magnitude's gradient",
    kills=("GRAD-3", "GRAD-5"),
    kind="autograd",
    only="negative E",
)
class GradientOfMagnitude(ByHand):
    def vjp(self, name: str, c: Tensor, *arguments: Any) -> Gradients:
        dx, dA, dE, dB = super().vjp(name, c, *arguments)
        E = arguments[3]
        return dx, dA, torch.where(E < 0, -dE, dE), dB


@mutant(
    "negative singular values do not train A",
    kills=("GRAD-2", "GRAD-5"),
    kind="masks",
    only="negative E",
)
class NegativeDoesNotTrain(ByHand):
    def singular(self, part: Part, E: Tensor) -> Tensor:
        return E.clamp(min=0.0) if part == "A" else E


@mutant("hides a NaN in the gradients", kills=("GRAD-20",), kind="autograd", only="NaN")
class HidesNaN(ByHand):
    def vjp(self, *arguments: Any) -> Gradients:
        return tuple(g.nan_to_num(0.0, 0.0, 0.0) for g in super().vjp(*arguments))  # type: ignore[return-value]


@mutant(
    "skips incoming gradients that are not finite", kills=("GRAD-20",), kind="autograd", only="NaN"
)
class SkipsNotFinite(HonestLayer):
    def forward(self, x: Tensor) -> Tensor:
        return tampered(
            super().forward(x), lambda g: g if g.isfinite().all() else 0.0 * g.nan_to_num()
        )


@mutant("spreads a NaN over the rows of dx", kills=("GRAD-20",), kind="broadcasting", only="NaN")
class SpreadsNaN(ByHand):
    def vjp(self, *arguments: Any) -> Gradients:
        dx, *rest = super().vjp(*arguments)
        return dx + 0.0 * dx.sum(0, keepdim=True), *rest  # type: ignore[return-value]


@mutant(
    "a second derivative takes E for a constant",
    kills=("GRAD-21",),
    kind="autograd",
    only="second backward",
)
class ConstantE(ByHand):
    def singular(self, part: Part, E: Tensor) -> Tensor:
        return E.detach()


class _SkipsRow(ByHand):
    """The row after a full block of a kernel is left out of the sums over the batch, and of dx."""

    row = 0

    def vjp(self, name: str, c: Tensor, G: Tensor, *factors: Tensor) -> Gradients:
        kept = torch.ones(len(G), 1, device=G.device)
        kept[self.row : self.row + 1] = 0.0
        return super().vjp(name, c, G * kept, *factors)  # type: ignore[arg-type]


@mutant("leaves row 16 out of backward", kills=("GRAD-22",), kind="boundary", only="17 rows")
class SkipsRow16(_SkipsRow):
    row = 16


@mutant("leaves row 32 out of backward", kills=("GRAD-22",), kind="boundary", only="33 rows")
class SkipsRow32(_SkipsRow):
    row = 32


@mutant("leaves row 64 out of backward", kills=("GRAD-22",), kind="boundary", only="65 rows")
class SkipsRow64(_SkipsRow):
    row = 64


@mutant("leaves row 128 out of backward", kills=("GRAD-22",), kind="boundary", only="129 rows")
class SkipsRow128(_SkipsRow):
    row = 128


@mutant(
    "leaves inputs beyond a multiple of 64 out of backward",
    kills=("GRAD-22",),
    kind="boundary",
    only="in not a multiple of 64",
)
class SkipsRaggedInputs(ByHand):
    def vjp(self, *arguments: Any) -> Gradients:
        dx, dA, dE, dB = super().vjp(*arguments)
        kept = torch.ones(dx.shape[1], device=dx.device)
        if len(kept) > 64:
            kept[len(kept) // 64 * 64 :] = 0.0
        return dx * kept, dA * kept, dE, dB


@mutant(
    "leaves outputs beyond a multiple of 64 out of backward",
    kills=("GRAD-22",),
    kind="boundary",
    only="in not a multiple of 64",
)
class SkipsRaggedOutputs(ByHand):
    def vjp(self, *arguments: Any) -> Gradients:
        dx, dA, dE, dB = super().vjp(*arguments)
        kept = torch.ones(len(dB), 1, device=dx.device)
        if len(kept) > 64:
            kept[len(kept) // 64 * 64 :] = 0.0
        return dx, dA, dE, dB * kept


@mutant("trains no more ranks than inputs", kills=("GRAD-22",), kind="boundary", only="r > in")
class TrainsUpToInputs(ByHand):
    def vjp(self, *arguments: Any) -> Gradients:
        dx, dA, dE, dB = super().vjp(*arguments)
        live = (torch.arange(len(dE), device=dE.device) < dx.shape[1]).float()
        return dx, dA, dE * live[:, None], dB


@mutant(
    "a rank of one trains with a mean for a sum",
    kills=("GRAD-3", "GRAD-5", "GRAD-22"),
    kind="boundary",
    only="r = 1",
)
class MeanForRankOne(ByHand):
    def vjp(self, *arguments: Any) -> Gradients:
        dx, dA, dE, dB = super().vjp(*arguments)
        return dx, dA, dE / dA.shape[1] if len(dE) == 1 else dE, dB


@mutant("trains in train mode only", kills=("GRAD-23",), kind="autograd", only="eval")
class TrainsInTrainMode(HonestLayer):
    def triplets(self, name: str) -> tuple[Tensor, Tensor, Tensor]:
        A, E, B = super().triplets(name)
        return (A, E, B) if self.training else (A.detach(), E.detach(), B.detach())


@mutant("x gets half a gradient in eval mode", kills=("GRAD-23",), kind="autograd", only="eval")
class HalfInEval(HonestLayer):
    def delta(self, x: Tensor, name: str) -> Tensor:
        return super().delta(x if self.training else tampered(x, lambda g: g / 2), name)


class _Unguarded(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, Q: Tensor) -> Tensor:
        ctx.kept = x, Q.detach()  # past `save_for_backward`, and so past its check of versions
        return x @ Q.T

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor]:
        x, Q = ctx.kept
        flat = g.reshape(g.shape[:-1].numel(), g.shape[-1])
        return g @ Q, flat.T @ x.detach().reshape(len(flat), x.shape[-1])


@mutant("reads in backward what was written into x since", kills=("GRAD-24",), kind="aliasing")
class Unguarded(HonestLayer):
    def product(self, x: Tensor, A: Tensor, E: Tensor, B: Tensor) -> Tensor:
        hidden: Tensor = _Unguarded.apply(x, A * E)  # type: ignore[no-untyped-call]
        return hidden @ B.T


@mutant(
    "x gets no gradient when it is recomputed",
    kills=("GRAD-10",),
    kind="autograd",
    only="checkpointing",
)
class DetachesWhenRecomputed(HonestLayer):
    def delta(self, x: Tensor, name: str) -> Tensor:
        recomputing = torch._C._current_graph_task_id() != -1
        return super().delta(x.detach() if recomputing else x, name)


@mutant(
    "the second adapter gives x no gradient",
    kills=("GRAD-1",),
    kind="autograd",
    only="second adapter",
)
class SecondDetaches(HonestLayer):
    def delta(self, x: Tensor, name: str) -> Tensor:
        return super().delta(x if name == self.active_adapters[0] else x.detach(), name)


@mutant(
    "saturates the gradient of B at the largest number of fp16",
    kills=("GRAD-25",),
    kind="autograd",
    only="large values",
)
class SaturatesDB(ByHand):
    def vjp(self, *arguments: Any) -> Gradients:
        dx, dA, dE, dB = super().vjp(*arguments)
        return dx, dA, dE, dB.clamp(-65504.0, 65504.0)

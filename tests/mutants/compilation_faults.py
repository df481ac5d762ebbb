"""Mutants of chapter COMP: what only a compiler sees, or brings about."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tests.mutants.honest import HonestLayer
from tests.mutants.mutant import mutant


@torch.compiler.assume_constant_result
def _constant(number: Tensor) -> Tensor:
    return number.detach().clone()


@mutant("compiles ranknum as a constant", kills=("COMP-1",), kind="state", only="compiled")
class ConstantRanknum(HonestLayer):
    def factor(self, name: str) -> Tensor:
        if torch.compiler.is_compiling():
            return self.scaling[name] / (_constant(self.ranknum[name]) + self.epsilon)
        return super().factor(name)


@mutant(
    "compiled, adds the first adapter alone", kills=("COMP-1",), kind="adapters", only="compiled"
)
class FirstAdapterWhenCompiled(HonestLayer):
    def active(self) -> Sequence[str]:
        return self.active_adapters[:1] if torch.compiler.is_compiling() else self.active_adapters


@mutant(
    "compiled, leaves the singular values out",
    kills=("COMP-1",),
    kind="arithmetic",
    only="compiled",
)
class NoSingularValuesWhenCompiled(HonestLayer):
    def triplets(self, name: str) -> tuple[Tensor, Tensor, Tensor]:
        A, E, B = super().triplets(name)
        return A, torch.ones_like(E) if torch.compiler.is_compiling() else E, B


@mutant("compiled, trains A and B alone", kills=("COMP-1",), kind="autograd", only="compiled")
class NoGradientOfEWhenCompiled(HonestLayer):
    def triplets(self, name: str) -> tuple[Tensor, Tensor, Tensor]:
        A, E, B = super().triplets(name)
        return A, E.detach() if torch.compiler.is_compiling() else E, B


@mutant(
    "compiled, goes on with what is no longer active",
    kills=("COMP-1",),
    kind="state",
    only="compiled",
)
class ActiveWhenFirstCompiled(HonestLayer):
    def active(self) -> Sequence[str]:
        if not torch.compiler.is_compiling():
            return self.active_adapters
        return list(self.lora_A)


@mutant(
    "reads ranknum as a number in every forward",
    kills=("COMP-2",),
    kind="dispatch",
    only="compiled",
)
class ReadsRanknum(HonestLayer):
    def factor(self, name: str) -> Tensor:
        ranknum = float(self.ranknum[name])
        return super().factor(name) if ranknum >= 0 else -super().factor(name)


@mutant(
    "looks for infinities where it evaluates", kills=("COMP-2",), kind="dispatch", only="compiled"
)
class LooksForInfinities(HonestLayer):
    def base_output(self, x: Tensor) -> Tensor:
        if not self.training and bool(x.isinf().any()):
            return super().base_output(x.contiguous())
        return super().base_output(x)


@mutant("looks at what dropout has left", kills=("COMP-2",), kind="masks", only="compiled")
class LooksAtTheMask(HonestLayer):
    def dropped(self, x: Tensor, name: str) -> Tensor:
        y = super().dropped(x, name)
        drops = self.lora_dropout[name].training and getattr(self.lora_dropout[name], "p", 0.0)
        return torch.zeros_like(y) if drops and not bool(y.any()) else y


@mutant("numbers its forwards", kills=("COMP-3", "COMP-4"), kind="state", only="compiled")
class NumbersItsForwards(HonestLayer):
    forwards: tuple[None, ...] = ()

    def base_output(self, x: Tensor) -> Tensor:
        self.forwards = (*self.forwards, None)
        return super().base_output(x)


@mutant("numbers its activations", kills=("COMP-3",), kind="adapters", only="compiled")
class NumbersItsActivations(HonestLayer):
    activations: tuple[None, ...] = ()

    def set_adapter(self, names: Any) -> None:
        super().set_adapter(names)
        self.activations = (*self.activations, None)

    def active(self) -> Sequence[str]:
        return self.active_adapters if self.activations else ()


@mutant("multiplies its rows two by two", kills=("COMP-4",), kind="boundary", only="compiled")
class TwoByTwo(HonestLayer):
    def product(self, x: Tensor, A: Tensor, E: Tensor, B: Tensor) -> Tensor:
        if x.dim() != 2 or not len(x):
            return super().product(x, A, E, B)
        parts = [super(TwoByTwo, self).product(part, A, E, B) for part in x.split(2)]
        return torch.cat(parts)

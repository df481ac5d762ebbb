"""Mutants of chapter ADPT: which adapters count, which are trained, and what they are called."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tests.mutants.honest import HonestLayer
from tests.mutants.mutant import mutant, tampered


@mutant(
    "uses the first active adapter only",
    kills=("ADPT-1", "ADPT-5"),
    kind="adapters",
    only="second adapter",
)
class FirstOnly(HonestLayer):
    def active(self) -> Sequence[str]:
        return self.active_adapters[:1]


@mutant("uses the last active adapter only", kills=("ADPT-1",), kind="adapters")
class LastOnly(HonestLayer):
    def active(self) -> Sequence[str]:
        return self.active_adapters[-1:]


@mutant("averages the active adapters", kills=("ADPT-1",), kind="adapters")
class Averages(HonestLayer):
    def factor(self, name: str) -> Tensor:
        return super().factor(name) / len(self.active_adapters)


@mutant(
    "trains the second adapter with the first one's gradient",
    kills=("GRAD-2",),
    kind="autograd",
    only="second adapter",
)
class WrongGradientToSecond(HonestLayer):
    def triplets(self, name: str) -> tuple[Tensor, Tensor, Tensor]:
        A, E, B = super().triplets(name)
        first = name == self.active_adapters[0]
        return (A, E, B) if first else (tampered(A, lambda g: g * 0.5), E, B)


class _RoundsLater(HonestLayer):
    """Later adapters get an x that an earlier one left behind."""

    def leave(self, x: Tensor) -> Tensor:
        return x

    def forward(self, x: Tensor) -> Tensor:
        y = self.base_output(x)
        if self.disable_adapters:
            return y
        for name in self.active():
            y = self.combine(y, self.delta(x, name))
            x = self.leave(x)
        return y


@mutant(
    "gives the second adapter a rounded x",
    kills=("ADPT-1", "ADPT-2"),
    kind="adapters",
    only="second adapter",
)
class RoundsForSecond(_RoundsLater):
    def leave(self, x: Tensor) -> Tensor:
        return x.bfloat16().to(x.dtype) if x.dtype == torch.float32 else x


@mutant(
    "gives the second adapter the first one's dropped x",
    kills=("DROP-10",),
    kind="masks",
    only="second adapter",
)
class DropsForSecond(_RoundsLater):
    def delta(self, x: Tensor, name: str) -> Tensor:
        self.left = self.dropped(x, name)
        A, E, B = self.triplets(name)
        return self.product(self.left, A, E, B) * self.factor(name)

    def leave(self, x: Tensor) -> Tensor:
        return self.left.to(x.dtype)


@mutant("uses inactive adapters too", kills=("ADPT-3", "ADPT-5"), kind="adapters")
class UsesInactive(HonestLayer):
    def active(self) -> Sequence[str]:
        return list(self.lora_A)


@mutant("gives inactive adapters a gradient", kills=("ADPT-3", "ADPT-11"), kind="autograd")
class TrainsInactive(HonestLayer):
    def set_adapter(self, names: Any) -> None:
        super().set_adapter(names)
        for parameters in (self.lora_A, self.lora_E, self.lora_B):
            parameters.requires_grad_(True)

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        for name in set(self.lora_A) - set(self.active_adapters):
            delta = self.delta(x, name).to(y.dtype)
            y = y + (delta - delta.detach())
        return y


@mutant("goes on while adapters are disabled", kills=("ADPT-4",), kind="adapters")
class IgnoresDisabling(HonestLayer):
    def enable_adapters(self, enabled: bool) -> None:
        return None


@mutant("forgets what was active when adapters are disabled", kills=("ADPT-4",), kind="adapters")
class ForgetsActive(HonestLayer):
    def enable_adapters(self, enabled: bool) -> None:
        super().enable_adapters(enabled)
        self.set_adapter(list(self.lora_A)[:1])


@mutant("clears the singular values when adapters are disabled", kills=("ADPT-4",), kind="state")
class ClearsWhenDisabled(HonestLayer):
    def enable_adapters(self, enabled: bool) -> None:
        super().enable_adapters(enabled)
        if not enabled:
            for E in self.lora_E.values():
                nn.init.zeros_(E)


@mutant("ignores all but the first of a list of names", kills=("ADPT-5",), kind="adapters")
class FirstOfAList(HonestLayer):
    def set_adapter(self, names: Any) -> None:
        super().set_adapter(names if isinstance(names, str) else list(names)[:1])


@mutant("adds to the active adapters instead of switching", kills=("ADPT-5",), kind="adapters")
class AddsToActive(HonestLayer):
    def set_adapter(self, names: Any) -> None:
        wanted = [names] if isinstance(names, str) else list(names)
        super().set_adapter(list(dict.fromkeys([*self.active_adapters, *wanted])))


@mutant("ignores unknown adapter names", kills=("ADPT-6",), kind="refusals")
class IgnoresUnknown(HonestLayer):
    def set_adapter(self, names: Any) -> None:
        wanted = [names] if isinstance(names, str) else list(names)
        super().set_adapter([n for n in wanted if n in self.lora_A])


@mutant("forgets the active adapters before it refuses a name", kills=("ADPT-6",), kind="refusals")
class ForgetsBeforeRefusal(HonestLayer):
    def set_adapter(self, names: Any) -> None:
        self.active_adapters = []
        super().set_adapter(names)


@mutant("overwrites an adapter of the same name", kills=("ADPT-7",), kind="adapters")
class Overwrites(HonestLayer):
    def check(self, name: str, r: int, dropout: float) -> None:
        super().check("new" if name in self.lora_A else name, r, dropout)


@mutant("takes names with a dot", kills=("ADPT-7",), kind="refusals")
class TakesDots(HonestLayer):
    def check(self, name: str, r: int, dropout: float) -> None:
        super().check(name.replace(".", "_"), r, dropout)


@mutant("takes an empty name", kills=("ADPT-7",), kind="refusals")
class TakesEmptyNames(HonestLayer):
    def check(self, name: str, r: int, dropout: float) -> None:
        super().check(name or "empty", r, dropout)


@mutant("does not say its ranks", kills=("ADPT-8",), kind="adapters")
class ForgetsRanks(HonestLayer):
    def update_layer(self, *arguments: Any, **named: Any) -> None:
        super().update_layer(*arguments, **named)
        del self.r[arguments[0]]


@mutant("spells base_layer otherwise", kills=("ADPT-8", "INIT-5"), kind="adapters")
class SpellsOtherwise(HonestLayer):
    def adopt(self, base: nn.Module) -> None:
        super().adopt(base)
        self.__dict__["_wrapped"] = base
        del self._modules["base_layer"]
        self.linear = base

    def __getattr__(self, name: str) -> Any:
        own = name == "base_layer" and "linear" in self._modules and _called_from_here()
        return super().__getattr__("linear" if own else name)


def _called_from_here() -> bool:
    """Whether the layer's own code asks, two frames up."""
    return sys._getframe(2).f_globals["__name__"].startswith("tests.mutants")


@mutant("finds adapters by a part of their name", kills=("ADPT-9",), kind="adapters")
class Substrings(HonestLayer):
    def active(self) -> Sequence[str]:
        return [n for n in self.lora_A if any(a in n for a in self.active_adapters)]


@mutant("scales adapters by the first name that matches", kills=("ADPT-9",), kind="adapters")
class SubstringScaling(HonestLayer):
    def factor(self, name: str) -> Tensor:
        return super().factor(next(n for n in self.scaling if n in name))


@mutant("takes B from the first name that matches and fits", kills=("ADPT-9",), kind="adapters")
class SubstringB(HonestLayer):
    def triplets(self, name: str) -> tuple[Tensor, Tensor, Tensor]:
        A, E, B = super().triplets(name)
        fitting = (b for n, b in self.lora_B.items() if n in name and b.shape == B.shape)
        return A, E, next(fitting)


@mutant("draws all adapters anew when one is added", kills=("ADPT-10",), kind="adapters")
class DrawsAllAnew(HonestLayer):
    def reset(self, name: str, identity: bool) -> None:
        for one in self.lora_A:
            super().reset(one, identity)


@mutant("gives all adapters the new one's alpha", kills=("ADPT-10",), kind="adapters")
class OneAlpha(HonestLayer):
    def update_layer(self, adapter_name: str, *rest: Any, **named: Any) -> None:
        super().update_layer(adapter_name, *rest, **named)
        for one in self.scaling:
            self.scaling[one] = self.scaling[adapter_name]


@mutant("leaves all adapters trainable", kills=("ADPT-11", "STATE-8"), kind="adapters")
class AllTrainable(HonestLayer):
    def set_adapter(self, names: Any) -> None:
        super().set_adapter(names)
        for parameters in (self.lora_A, self.lora_E, self.lora_B):
            parameters.requires_grad_(True)


@mutant("starts adapters in train mode", kills=("ADPT-12",), kind="masks", only="eval")
class BornInTrainMode(HonestLayer):
    def update_layer(self, adapter_name: str, *rest: Any, **named: Any) -> None:
        super().update_layer(adapter_name, *rest, **named)
        self.lora_dropout[adapter_name].train()


@mutant("leaves disabled adapters trainable", kills=("ADPT-13",), kind="adapters")
class TrainsDisabled(HonestLayer):
    def enable_adapters(self, enabled: bool) -> None:
        super().enable_adapters(enabled)
        self.train_only(self.active_adapters)


@mutant("leaves enabled adapters frozen", kills=("ADPT-13",), kind="adapters")
class FrozenWhenEnabled(HonestLayer):
    def enable_adapters(self, enabled: bool) -> None:
        super().enable_adapters(enabled)
        self.train_only([])


@mutant("trains every adapter once they are enabled", kills=("ADPT-13",), kind="adapters")
class TrainsAllWhenEnabled(HonestLayer):
    def enable_adapters(self, enabled: bool) -> None:
        super().enable_adapters(enabled)
        self.train_only(list(self.lora_A) if enabled else [])

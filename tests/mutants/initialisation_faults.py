"""Mutants of chapter INIT: what a new adapter holds, and which arguments are taken."""

from __future__ import annotations

import copy
import math
from typing import Any, ClassVar

import torch
from torch import nn

from tests.mutants.honest import HonestLayer
from tests.mutants.mutant import mutant


@mutant("starts E at one", kills=("INIT-1", "INIT-2", "GRAD-6"), kind="initialisation")
class StartsAtOne(HonestLayer):
    def reset(self, name: str, identity: bool) -> None:
        super().reset(name, identity)
        self.lora_E[name].fill_(1.0)


@mutant(
    "starts with B = 0 instead of E = 0, as LoRA does",
    kills=("INIT-2", "INIT-3", "GRAD-6"),
    kind="initialisation",
)
class StartsLikeLora(HonestLayer):
    def reset(self, name: str, identity: bool) -> None:
        super().reset(name, identity)
        nn.init.normal_(self.lora_E[name], 0.0, 0.02)
        nn.init.zeros_(self.lora_B[name])


@mutant("starts E near zero", kills=("INIT-1", "INIT-2"), kind="initialisation")
class StartsNearZero(HonestLayer):
    def reset(self, name: str, identity: bool) -> None:
        super().reset(name, identity)
        nn.init.normal_(self.lora_E[name], 0.0, 1e-2)


@mutant("stores B transposed", kills=("INIT-2", "ADPT-8"), kind="initialisation")
class TransposedB(HonestLayer):
    def reset(self, name: str, identity: bool) -> None:
        super().reset(name, identity)
        self.lora_B[name].data = self.lora_B[name].data.T

    def triplets(self, name: str) -> Any:
        A, E, B = super().triplets(name)
        return A, E, B.T


@mutant("draws with a deviation of 0.0215", kills=("INIT-3",), kind="initialisation")
class WiderDraw(HonestLayer):
    deviation = 0.0215


@mutant("draws with a variance of 0.02", kills=("INIT-3",), kind="initialisation")
class VarianceForDeviation(HonestLayer):
    deviation = math.sqrt(0.02)


@mutant("draws uniformly", kills=("INIT-3",), kind="initialisation")
class DrawsUniformly(HonestLayer):
    def reset(self, name: str, identity: bool) -> None:
        super().reset(name, identity)
        limit = 0.02 * math.sqrt(3.0)
        nn.init.uniform_(self.lora_A[name], -limit, limit)


@mutant("cuts the tails off", kills=("INIT-3",), kind="initialisation")
class CutsTails(HonestLayer):
    def reset(self, name: str, identity: bool) -> None:
        super().reset(name, identity)
        if identity:
            self.lora_B[name].clamp_(-0.04, 0.04)


@mutant("draws A as LoRA does", kills=("INIT-3",), kind="initialisation")
class DrawsLikeLora(HonestLayer):
    def reset(self, name: str, identity: bool) -> None:
        super().reset(name, identity)
        if self.lora_A[name].numel():
            nn.init.kaiming_uniform_(self.lora_A[name], a=math.sqrt(5))


@mutant("draws every adapter from one seed", kills=("INIT-4",), kind="initialisation")
class OneSeed(HonestLayer):
    def reset(self, name: str, identity: bool) -> None:
        torch.manual_seed(0)
        super().reset(name, identity)


@mutant("draws A and B from the same numbers", kills=("INIT-4",), kind="initialisation")
class SameNumbers(HonestLayer):
    def reset(self, name: str, identity: bool) -> None:
        super().reset(name, identity)
        A, B = self.lora_A[name].view(-1), self.lora_B[name].view(-1)
        count = min(len(A), len(B))
        B[:count] = A[:count]


@mutant("draws from a generator that no seed reaches", kills=("INIT-4",), kind="initialisation")
class UnseededDraw(HonestLayer):
    def reset(self, name: str, identity: bool) -> None:
        super().reset(name, identity)
        generator = torch.Generator()
        generator.seed()
        self.lora_A[name].normal_(0.0, 0.02, generator=generator)


@mutant("copies the base layer", kills=("INIT-5", "FWD-20"), kind="aliasing")
class CopiesBase(HonestLayer):
    def adopt(self, base: nn.Module) -> None:
        super().adopt(copy.deepcopy(base))


@mutant("leaves the base layer trainable", kills=("INIT-5",), kind="state")
class LeavesTrainable(HonestLayer):
    def adopt(self, base: Any) -> None:
        flags = {n: p.requires_grad for n, p in base.named_parameters()}
        super().adopt(base)
        for name, parameter in base.named_parameters():
            parameter.requires_grad_(flags[name])


@mutant("trains the bias when adapters are enabled", kills=("INIT-5", "STATE-8"), kind="state")
class TrainsBias(HonestLayer):
    def set_adapter(self, names: Any) -> None:
        super().set_adapter(names)
        if self.base_layer.bias is not None:
            self.base_layer.bias.requires_grad_(True)


@mutant("takes a negative rank for zero", kills=("INIT-6",), kind="refusals")
class NegativeRank(HonestLayer):
    def check(self, name: str, r: int, dropout: float) -> None:
        super().check(name, max(r, 0) if type(r) is int else r, dropout)

    def update_layer(self, adapter_name: str, r: int, *rest: Any, **named: Any) -> None:
        super().update_layer(adapter_name, max(r, 0) if type(r) is int else r, *rest, **named)


@mutant("checks a new adapter's rank too late", kills=("INIT-6",), kind="refusals")
class ChecksTooLate(HonestLayer):
    def update_layer(self, adapter_name: str, r: int, *rest: Any, **named: Any) -> None:
        self.r[adapter_name] = r
        super().update_layer(adapter_name, r, *rest, **named)


@mutant("rounds a rank down", kills=("INIT-7",), kind="refusals")
class RoundsRank(HonestLayer):
    def check(self, name: str, r: int, dropout: float) -> None:
        super().check(name, int(r), dropout)

    def update_layer(self, adapter_name: str, r: int, *rest: Any, **named: Any) -> None:
        super().update_layer(adapter_name, int(r), *rest, **named)


@mutant("takes True for a rank", kills=("INIT-7",), kind="refusals")
class TrueRank(HonestLayer):
    def check(self, name: str, r: int, dropout: float) -> None:
        super().check(name, int(r) if isinstance(r, bool) else r, dropout)

    def update_layer(self, adapter_name: str, r: int, *rest: Any, **named: Any) -> None:
        super().update_layer(adapter_name, r + 0 if r is True else r, *rest, **named)


@mutant("limits a dropout out of range", kills=("INIT-8",), kind="refusals")
class LimitsDropout(HonestLayer):
    def check(self, name: str, r: int, dropout: float) -> None:
        super().check(name, r, min(max(dropout, 0.0), 0.99))

    def update_layer(
        self, adapter_name: str, r: int, lora_alpha: float = 1, lora_dropout: float = 0.0,
        init_lora_weights: bool = True,
    ) -> None:  # fmt: skip
        limited = min(max(lora_dropout, 0.0), 0.99)
        super().update_layer(adapter_name, r, lora_alpha, limited, init_lora_weights)


@mutant("takes a dropout of one", kills=("INIT-8",), kind="refusals")
class DropsAll(HonestLayer):
    def check(self, name: str, r: int, dropout: float) -> None:
        super().check(name, r, 0.0 if dropout == 1.0 else dropout)


@mutant("wraps any base layer", kills=("INIT-9",), kind="dispatch")
class WrapsAnything(HonestLayer):
    def check_base(self, base: nn.Module) -> None:
        return None


@mutant("wraps any bitsandbytes layer", kills=("INIT-9",), kind="dispatch")
class WrapsAnyQuantised(HonestLayer):
    def check_base(self, base: nn.Module) -> None:
        if type(base) is nn.Linear:
            raise TypeError("Expected a bitsandbytes layer.")


@mutant("freezes the base layer before it refuses", kills=("INIT-10",), kind="refusals")
class FreezesFirst(HonestLayer):
    def check_base(self, base: nn.Module) -> None:
        base.requires_grad_(False)
        super().check_base(base)


@mutant("switches the mode before it refuses", kills=("INIT-10",), kind="refusals")
class EvaluatesFirst(HonestLayer):
    def check_base(self, base: nn.Module) -> None:
        base.train(not base.training)
        super().check_base(base)


@mutant("ignores init_lora_weights=False", kills=("INIT-11",), kind="initialisation")
class AlwaysIdentity(HonestLayer):
    def reset(self, name: str, identity: bool) -> None:
        super().reset(name, True)


class _Defaults(HonestLayer):
    """Its own idea of what an argument is that was left out."""

    defaults: ClassVar[dict[str, Any]] = {}

    def __init__(self, base_layer: nn.Module, adapter_name: str, **named: Any) -> None:
        super().__init__(base_layer, adapter_name, **(self.defaults | named))


@mutant("has rank 8 if no rank is given", kills=("INIT-12",), kind="initialisation")
class DefaultRank(_Defaults):
    defaults = {"r": 8}


@mutant("scales by 8 if no alpha is given", kills=("INIT-12",), kind="initialisation")
class DefaultAlpha(_Defaults):
    defaults = {"lora_alpha": 8}


@mutant("drops a tenth if no dropout is given", kills=("INIT-12",), kind="initialisation")
class DefaultDropout(_Defaults):
    defaults = {"lora_dropout": 0.1}


@mutant("is not the identity if nobody asks for it", kills=("INIT-12",), kind="initialisation")
class DefaultInitialisation(_Defaults):
    defaults = {"init_lora_weights": False}

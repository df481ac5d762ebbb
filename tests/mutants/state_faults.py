"""Mutants of chapter STATE: checkpoints, copies, modes, and what is remembered between calls."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tests.mutants.honest import HonestLayer
from tests.mutants.mutant import mutant, tampered


@mutant("does not save ranknum", kills=("STATE-1", "STATE-2"), kind="state")
class DoesNotSaveRanknum(HonestLayer):
    def state_dict(self, *arguments: Any, **named: Any) -> Any:
        saved = super().state_dict(*arguments, **named)
        return type(saved)((k, v) for k, v in saved.items() if "ranknum" not in k)


@mutant("saves under names of its own", kills=("STATE-1",), kind="state")
class SavesOtherwise(HonestLayer):
    def state_dict(self, *arguments: Any, **named: Any) -> Any:
        saved = super().state_dict(*arguments, **named)
        return type(saved)((k.replace("lora_", "svd_"), v) for k, v in saved.items())

    def load_state_dict(self, state_dict: Any, *rest: Any, **named: Any) -> Any:
        back = {k.replace("svd_", "lora_"): v for k, v in state_dict.items()}
        return super().load_state_dict(back, *rest, **named)


@mutant("does not load E", kills=("STATE-2",), kind="state")
class DoesNotLoadE(HonestLayer):
    def load_base(self, state: dict[str, Any], prefix: str) -> None:
        super().load_base(state, prefix)
        for key in [k for k in state if "lora_E." in k]:
            state[key] = torch.zeros_like(state[key])


@mutant("rounds what it saves to bf16", kills=("STATE-2",), kind="dtype")
class SavesRounded(HonestLayer):
    def load_base(self, state: dict[str, Any], prefix: str) -> None:
        super().load_base(state, prefix)
        for key in [k for k in state if "lora_" in k]:
            state[key] = state[key].bfloat16().float()


@mutant("copies share their parameters", kills=("STATE-3",), kind="aliasing")
class SharesParameters(HonestLayer):
    def __deepcopy__(self, memo: dict[int, Any]) -> HonestLayer:
        twin = type(self).__new__(type(self))
        twin.__dict__.update(self.__dict__)
        return twin


@mutant("copies lose the singular values", kills=("STATE-3", "STATE-4"), kind="state")
class CopiesLoseE(HonestLayer):
    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        with torch.no_grad():
            for E in self.lora_E.values():
                E.zero_()


@mutant("cannot be pickled", kills=("STATE-4",), kind="state")
class CannotBePickled(HonestLayer):
    def adopt(self, base: nn.Module) -> None:
        super().adopt(base)
        self.activation = lambda y: y


@mutant("train() and eval() do not reach the base layer", kills=("STATE-5",), kind="state")
class BaseStays(HonestLayer):
    def train(self, mode: bool = True) -> HonestLayer:
        base = getattr(self, "base_layer", None)
        before = base.training if base is not None else mode
        super().train(mode)
        if base is not None:
            base.train(before)
        return self


@mutant("train() and eval() do not reach the dropouts", kills=("STATE-5", "DROP-4"), kind="state")
class DropoutsStay(HonestLayer):
    def train(self, mode: bool = True) -> HonestLayer:
        super().train(mode)
        self.lora_dropout.train(True)
        return self


@mutant("lets bitsandbytes repack the weight", kills=("STATE-6", "STATE-7"), kind="state")
class LetsRepack(HonestLayer):
    def adopt(self, base: Any) -> None:
        allowed = getattr(base, "support_avx512bf16_for_cpu", False)
        super().adopt(base)
        base.support_avx512bf16_for_cpu = allowed


@mutant(
    "stops training once it has evaluated",
    kills=("STATE-6", "STATE-12"),
    kind="autograd",
    only="second call",
)
class StopsTraining(HonestLayer):
    evaluated = False

    def triplets(self, name: str) -> tuple[Tensor, Tensor, Tensor]:
        self.evaluated |= not (self.training and torch.is_grad_enabled())
        A, E, B = super().triplets(name)
        return (tampered(A, lambda g: g * 0.5), E, B) if self.evaluated else (A, E, B)


@mutant(
    "prunes small singular values when it evaluates", kills=("STATE-7",), kind="state", only="eval"
)
class PrunesInEval(HonestLayer):
    def factor(self, name: str) -> Tensor:
        if not self.training:
            E = self.lora_E[name].data
            E[E.abs() <= E.abs().min()] = 0.0
        return super().factor(name)


@mutant(
    "folds A and E once and for all", kills=("STATE-9", "SCALE-6"), kind="state", only="second call"
)
class FoldsOnce(HonestLayer):
    def product(self, x: Tensor, A: Tensor, E: Tensor, B: Tensor) -> Tensor:
        cache = self.__dict__.setdefault("folded", {})
        key = (tuple(A.shape), tuple(B.shape), float(A.detach().double().sum()))
        if key not in cache:
            cache[key] = (A * E).detach()
        folded = A * E
        return nn.functional.linear(
            nn.functional.linear(x, folded + (cache[key] - folded).detach()), B
        )


@mutant("draws a random number in every forward", kills=("STATE-10", "DROP-9"), kind="state")
class DrawsInForward(HonestLayer):
    def base_output(self, x: Tensor) -> Tensor:
        torch.randperm(3)
        return super().base_output(x)


@mutant("keeps the parameters it was born with", kills=("STATE-11",), kind="state")
class KeepsParameters(HonestLayer):
    def update_layer(self, adapter_name: str, *rest: Any, **named: Any) -> None:
        super().update_layer(adapter_name, *rest, **named)
        born = self.__dict__.setdefault("born", {})
        born[adapter_name] = self.lora_A[adapter_name]

    def triplets(self, name: str) -> tuple[Tensor, Tensor, Tensor]:
        _, E, B = super().triplets(name)
        return self.born[name], E, B


@mutant(
    "keeps a tensor that was made under inference mode",
    kills=("STATE-12",),
    kind="state",
    only="second call",
)
class KeepsInferenceTensor(HonestLayer):
    def factor(self, name: str) -> Tensor:
        kept = self.__dict__.setdefault("factors", {})
        if name not in kept or kept[name][0] != (self.scaling[name], float(self.ranknum[name])):
            kept[name] = ((self.scaling[name], float(self.ranknum[name])), super().factor(name))
        return kept[name][1]  # type: ignore[no-any-return]


@mutant("trains no further after no_grad", kills=("STATE-12",), kind="state", only="second call")
class RemembersNoGrad(HonestLayer):
    def triplets(self, name: str) -> tuple[Tensor, Tensor, Tensor]:
        if not torch.is_grad_enabled():
            for parameters in (self.lora_A, self.lora_E, self.lora_B):
                parameters[name].requires_grad_(False)
        return super().triplets(name)


@mutant("makes only A trainable", kills=("STATE-8", "GRAD-6"), kind="autograd")
class OnlyATrainable(HonestLayer):
    def set_adapter(self, names: Any) -> None:
        super().set_adapter(names)
        self.lora_E.requires_grad_(False)


@mutant("keeps a checkpoint's own tensors", kills=("STATE-2",), kind="aliasing")
class KeepsCheckpoint(HonestLayer):
    def load_state_dict(self, state_dict: Any, *rest: Any, **named: Any) -> Any:
        return super().load_state_dict(state_dict, *rest, **(named | {"assign": True}))

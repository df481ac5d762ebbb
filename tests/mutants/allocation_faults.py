"""Faults of an allocator's hand: how large the budget is, who gets it, when, and what else is touched."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tests.mutants.honest_allocator import HonestAllocator
from tests.mutants.mutant import rank_mutant

# --- the budget -------------------------------------------------------------------------------------


@rank_mutant("lets the budget fall linearly", kills=("RANK-5",), kind="arithmetic")
class FallsLinearly(HonestAllocator):
    def falling(self, height: int, progress: float, target: int) -> int:
        return int(height * (1 - progress) + target)


@rank_mutant("rounds the budget up", kills=("RANK-5",), kind="boundary")
class RoundsUp(HonestAllocator):
    def falling(self, height: int, progress: float, target: int) -> int:
        return math.ceil(height * (1 - progress) ** 3 + target)


@rank_mutant("begins to fall at step 0", kills=("RANK-5",), kind="boundary")
class FallsFromZero(HonestAllocator):
    def budget(self, step: int) -> int:
        if step >= self.config.settled:
            return self.target()
        return self.falling(self.initial - self.target(), step / self.config.settled, self.target())


@rank_mutant("aims at target_r for all layers together", kills=("RANK-5",), kind="arithmetic")
class OneTarget(HonestAllocator):
    def target(self) -> int:
        return self.config.target_r


@rank_mutant("falls until total_step", kills=("RANK-5",), kind="boundary")
class FallsToTheEnd(HonestAllocator):
    def budget(self, step: int) -> int:
        start, target = self.config.tinit, self.target()
        if step <= start:
            return self.initial
        progress = min(1.0, (step - start) / (self.config.total_step - start))
        return self.falling(self.initial - target, progress, target)


@rank_mutant("returns how many it masked", kills=("RANK-5",), kind="state")
class ReturnsMasked(HonestAllocator):
    def step(self, global_step: int, grad_scale: float = 1.0) -> int:
        return self.initial - super().step(global_step, grad_scale)


@rank_mutant("returns the budget as a float", kills=("RANK-5",), kind="dtype")
class FloatBudget(HonestAllocator):
    def step(self, global_step: int, grad_scale: float = 1.0) -> Any:
        return float(super().step(global_step, grad_scale))


# --- when -------------------------------------------------------------------------------------------


@rank_mutant("masks in the warm-up", kills=("RANK-6",), kind="masks")
class MasksInWarmUp(HonestAllocator):
    def step(self, global_step: int, grad_scale: float = 1.0) -> int:
        budget = super().step(global_step, grad_scale)
        if global_step <= self.config.tinit:
            self.mask(self.choose(self.scores(), budget - 1))
        return budget


@rank_mutant("masks at every step of the fall", kills=("RANK-6",), kind="masks")
class IgnoresDeltaT(HonestAllocator):
    def allocates(self, step: int) -> bool:
        return self.config.tinit < step <= self.config.settled


@rank_mutant(
    "misses the last allocation unless deltaT divides it", kills=("RANK-6",), kind="boundary"
)
class MissesTheLast(HonestAllocator):
    def allocates(self, step: int) -> bool:
        return super().allocates(step) and step % self.config.deltaT == 0


@rank_mutant("counts deltaT from the end of the warm-up", kills=("RANK-6",), kind="boundary")
class CountsFromWarmUp(HonestAllocator):
    def allocates(self, step: int) -> bool:
        since = step - self.config.tinit
        falling = since > 0 and step < self.config.settled and since % self.config.deltaT == 0
        return falling or step == self.config.settled


@rank_mutant("leaves what was masked to the optimizer", kills=("RANK-6", "RANK-18"), kind="masks")
class MasksOnce(HonestAllocator):
    def step(self, global_step: int, grad_scale: float = 1.0) -> int:
        if global_step > self.config.settled:
            return self.budget(global_step)
        return super().step(global_step, grad_scale)


@rank_mutant("chooses again after the end", kills=("RANK-18",), kind="state")
class ChoosesAgain(HonestAllocator):
    def observes(self, step: int) -> bool:
        return True

    def allocates(self, step: int) -> bool:
        return super().allocates(step) or step > self.config.settled


@rank_mutant("observes the step of the last allocation", kills=("RANK-7",), kind="boundary")
class ObservesTheLast(HonestAllocator):
    def observes(self, step: int) -> bool:
        return step <= self.config.settled


# --- who --------------------------------------------------------------------------------------------


@rank_mutant("gives every layer its share", kills=("RANK-7",), kind="masks")
class SharesEqually(HonestAllocator):
    def choose(self, scores: Sequence[Tensor], budget: int) -> list[Tensor]:
        shares = [budget // len(scores) + (i < budget % len(scores)) for i in range(len(scores))]
        chosen = [HonestAllocator.choose(self, [s], n) for s, n in zip(scores, shares, strict=True)]
        return [keep for (keep,) in chosen]


@rank_mutant("keeps the least important", kills=("RANK-7",), kind="masks")
class KeepsTheLeast(HonestAllocator):
    def choose(self, scores: Sequence[Tensor], budget: int) -> list[Tensor]:
        return super().choose([-s for s in scores], budget)


@rank_mutant("keeps one more than the budget", kills=("RANK-7", "RANK-8"), kind="boundary")
class KeepsOneMore(HonestAllocator):
    def choose(self, scores: Sequence[Tensor], budget: int) -> list[Tensor]:
        return super().choose(scores, budget + 1)


@rank_mutant("leaves no layer without a triplet", kills=("RANK-7",), kind="masks")
class LeavesOneEach(HonestAllocator):
    def choose(self, scores: Sequence[Tensor], budget: int) -> list[Tensor]:
        keep = super().choose(scores, budget)
        for alive, score in zip(keep, scores, strict=True):
            if len(alive) and not alive.any():
                alive[score.argmax()] = True
        return keep


@rank_mutant(
    "allocates nothing beside a layer of rank 0",
    kills=("RANK-7",),
    kind="boundary",
    only="rank zero",
)
class StopsAtRankZero(HonestAllocator):
    def allocates(self, step: int) -> bool:
        return all(len(E) for E in self.every("lora_E")) and super().allocates(step)


@rank_mutant("masks all that tie with the threshold", kills=("RANK-8", "RANK-10"), kind="masks")
class MasksTies(HonestAllocator):
    """PEFT's way: whatever is not above the largest score that is to go."""

    def choose(self, scores: Sequence[Tensor], budget: int) -> list[Tensor]:
        threshold = torch.kthvalue(torch.cat(list(scores)), self.initial - budget)[0]
        return [s > threshold for s in scores]


@rank_mutant("keeps all that tie with the threshold", kills=("RANK-8",), kind="masks")
class KeepsTies(HonestAllocator):
    def choose(self, scores: Sequence[Tensor], budget: int) -> list[Tensor]:
        threshold = torch.cat(list(scores)).sort(descending=True)[0][budget - 1]
        return [s >= threshold for s in scores]


@rank_mutant("breaks ties by a coin", kills=("RANK-9",), kind="state")
class TossesCoin(HonestAllocator):
    def choose(self, scores: Sequence[Tensor], budget: int) -> list[Tensor]:
        order = torch.randperm(sum(map(len, scores)))
        together = torch.cat(list(scores))[order]
        (chosen,) = super().choose([together], budget)
        return list(chosen[order.argsort()].split([len(s) for s in scores]))


@rank_mutant("masks at least one triplet", kills=("RANK-10",), kind="boundary")
class MasksAtLeastOne(HonestAllocator):
    def choose(self, scores: Sequence[Tensor], budget: int) -> list[Tensor]:
        return super().choose(scores, min(budget, self.initial - 1))


@rank_mutant("never lets a masked triplet return", kills=("RANK-17",), kind="state")
class NeverReturns(HonestAllocator):
    def choose(self, scores: Sequence[Tensor], budget: int) -> list[Tensor]:
        if self.keep is not None:
            gone = zip(scores, self.keep, strict=True)
            scores = [s.masked_fill(~alive, -torch.inf) for s, alive in gone]
        return super().choose(scores, budget)


@rank_mutant("keeps the first choice", kills=("RANK-17",), kind="state", only="second call")
class KeepsFirstChoice(HonestAllocator):
    def choose(self, scores: Sequence[Tensor], budget: int) -> list[Tensor]:
        same = self.keep is not None and sum(int(k.sum()) for k in self.keep) >= budget
        return self.keep if same and self.keep else super().choose(scores, budget)


# --- whose ------------------------------------------------------------------------------------------


@rank_mutant(
    "counts triplets of adapters whose names contain its own", kills=("RANK-15",), kind="adapters"
)
class CountsOthers(HonestAllocator):
    def __init__(self, model: nn.Module, config: Any, adapter_name: str) -> None:
        super().__init__(model, config, adapter_name)
        self.initial = sum(
            len(layer.lora_E[name])
            for layer in self.layers
            for name in layer.lora_E
            if adapter_name in name
        )


@rank_mutant("masks adapters whose names contain its own", kills=("RANK-15",), kind="adapters")
class MasksOthers(HonestAllocator):
    def mask(self, keep: Sequence[Tensor]) -> None:
        super().mask(keep)
        for layer, alive in zip(self.layers, keep, strict=True):
            for name in layer.lora_E:
                if self.adapter in name:
                    layer.lora_E[name].masked_fill_(~alive[:, None], 0.0)


@rank_mutant(
    "takes gradients of adapters whose names begin as its own", kills=("RANK-15",), kind="adapters"
)
class TakesOthersGradients(HonestAllocator):
    def gradient(self, key: str, weight: Tensor) -> Tensor | None:
        index, part = key.split(".")
        parameters = getattr(self.layers[int(index)], part)
        last = [n for n in parameters if n.startswith(self.adapter)][-1]
        gradient: Tensor | None = parameters[last].grad
        return gradient


# --- what else --------------------------------------------------------------------------------------


@rank_mutant("divides by the rank that is left", kills=("RANK-16",), kind="arithmetic")
class ChangesRanknum(HonestAllocator):
    def mask(self, keep: Sequence[Tensor]) -> None:
        super().mask(keep)
        for layer, alive in zip(self.layers, keep, strict=True):
            layer.ranknum[self.adapter].fill_(float(alive.sum()))


@rank_mutant("masks the rows of A, too", kills=("RANK-16",), kind="masks")
class MasksA(HonestAllocator):
    def mask(self, keep: Sequence[Tensor]) -> None:
        super().mask(keep)
        for A, alive in zip(self.every("lora_A"), keep, strict=True):
            A.masked_fill_(~alive[:, None], 0.0)


@rank_mutant("zeroes the gradients of what it masks", kills=("RANK-16",), kind="autograd")
class ZeroesGradients(HonestAllocator):
    def mask(self, keep: Sequence[Tensor]) -> None:
        super().mask(keep)
        for E, alive in zip(self.every("lora_E"), keep, strict=True):
            if E.grad is not None:
                E.grad.masked_fill_(~alive[:, None], 0.0)


@rank_mutant("puts a masked copy in the place of E", kills=("RANK-16",), kind="aliasing")
class ReplacesE(HonestAllocator):
    """The optimizer goes on with the tensor that is no longer used."""

    def mask(self, keep: Sequence[Tensor]) -> None:
        for layer, alive in zip(self.layers, keep, strict=True):
            old = layer.lora_E[self.adapter]
            new = nn.Parameter(old.detach().masked_fill(~alive[:, None], 0.0))
            new.grad = old.grad
            layer.lora_E[self.adapter] = new


@rank_mutant("freezes a layer that lost all", kills=("RANK-16",), kind="state")
class FreezesLosers(HonestAllocator):
    def mask(self, keep: Sequence[Tensor]) -> None:
        super().mask(keep)
        for layer, alive in zip(self.layers, keep, strict=True):
            layer.lora_E[self.adapter].requires_grad_(bool(alive.all()))


@rank_mutant("writes the rank that is left into r", kills=("RANK-16",), kind="state")
class ChangesRank(HonestAllocator):
    def mask(self, keep: Sequence[Tensor]) -> None:
        super().mask(keep)
        for layer, alive in zip(self.layers, keep, strict=True):
            layer.r[self.adapter] = int(alive.sum())


# --- state ------------------------------------------------------------------------------------------


@rank_mutant("saves no uncertainties", kills=("RANK-19",), kind="state")
class SavesNoUncertainties(HonestAllocator):
    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "uncertainties": {}}


@rank_mutant("forgets the last choice when it is saved", kills=("RANK-19",), kind="state")
class SavesNoChoice(HonestAllocator):
    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "keep": None}


@rank_mutant("loads means in half precision", kills=("RANK-19",), kind="dtype")
class LoadsHalf(HonestAllocator):
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        means = {k: v.half().float() for k, v in state["means"].items()}
        super().load_state_dict({**state, "means": means})


@rank_mutant("has no state", kills=("RANK-19",), kind="state")
class HasNoState(HonestAllocator):
    state_dict = load_state_dict = None  # type: ignore[assignment]

"""Mutants of chapters SCALE and MERGE: the one scalar of an adapter, and the refusal to merge."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tests.mutants.honest import REFUSAL, HonestLayer
from tests.mutants.mutant import mutant


@mutant("leaves out the 1e-5", kills=("SCALE-1", "FWD-2"), kind="arithmetic")
class NoEpsilon(HonestLayer):
    epsilon = 0.0


@mutant("adds 1e-4", kills=("SCALE-1", "FWD-2", "SCALE-8"), kind="arithmetic")
class LargeEpsilon(HonestLayer):
    epsilon = 1e-4


@mutant("adds 1e-6", kills=("SCALE-1", "FWD-2"), kind="arithmetic")
class SmallEpsilon(HonestLayer):
    epsilon = 1e-6


@mutant("adds the 1e-5 to the quotient", kills=("SCALE-1", "FWD-2"), kind="arithmetic")
class EpsilonOutside(HonestLayer):
    def factor(self, name: str) -> Tensor:
        return self.scaling[name] / self.ranknum[name] + 1e-5


@mutant("divides by the square root of ranknum", kills=("SCALE-4", "FWD-2"), kind="arithmetic")
class SquareRoot(HonestLayer):
    def factor(self, name: str) -> Tensor:
        return self.scaling[name] / (self.ranknum[name] + 1e-5).sqrt()


@mutant("scales by alpha / r", kills=("SCALE-2",), kind="arithmetic")
class AlphaOverR(HonestLayer):
    def scale(self, r: int, alpha: float) -> float:
        return super().scale(r, alpha) / max(r, 1)


@mutant("divides by r and by ranknum", kills=("FWD-1", "SCALE-6"), kind="arithmetic")
class DividesTwice(HonestLayer):
    def factor(self, name: str) -> Tensor:
        return super().factor(name) / max(self.r[name], 1)


@mutant("truncates alpha to an integer", kills=("SCALE-2",), kind="arithmetic")
class TruncatesAlpha(HonestLayer):
    def scale(self, r: int, alpha: float) -> float:
        return super().scale(r, int(alpha)) if alpha > 0 else super().scale(r, alpha)


@mutant("scales by 1 where alpha is not positive", kills=("SCALE-3",), kind="arithmetic")
class OneForNoAlpha(HonestLayer):
    def scale(self, r: int, alpha: float) -> float:
        return alpha if alpha > 0 else 1.0


@mutant("takes a negative alpha as it is", kills=("SCALE-3",), kind="arithmetic")
class NegativeAlpha(HonestLayer):
    def scale(self, r: int, alpha: float) -> float:
        return alpha or float(r)


@mutant("divides by the rows of A", kills=("SCALE-4", "SCALE-1"), kind="arithmetic")
class DividesByRows(HonestLayer):
    def factor(self, name: str) -> Tensor:
        ranks = self.lora_A[name].new_tensor([float(len(self.lora_A[name]))])
        return self.scaling[name] / (ranks + 1e-5)


@mutant("starts ranknum at one", kills=("SCALE-5", "FWD-1"), kind="initialisation")
class RanknumOne(HonestLayer):
    def reset(self, name: str, identity: bool) -> None:
        super().reset(name, identity)
        self.ranknum[name].fill_(1.0)


@mutant("keeps ranknum in fp16", kills=("SCALE-5",), kind="dtype")
class RanknumInHalf(HonestLayer):
    def reset(self, name: str, identity: bool) -> None:
        super().reset(name, identity)
        self.ranknum[name].data = self.ranknum[name].data.half()

    def factor(self, name: str) -> Tensor:
        return self.scaling[name] / (self.ranknum[name].float() + 1e-5)


@mutant("divides by the current rank", kills=("SCALE-4", "SCALE-6"), kind="masks")
class DividesByCurrentRank(HonestLayer):
    def factor(self, name: str) -> Tensor:
        live = (self.lora_E[name] != 0).sum().float()
        return self.scaling[name] / (live + 1e-5)


@mutant("writes the current rank into ranknum", kills=("SCALE-6",), kind="state")
class WritesCurrentRank(HonestLayer):
    def factor(self, name: str) -> Tensor:
        live = (self.lora_E[name] != 0).sum()
        if 0 < int(live) < len(self.lora_E[name]):
            self.ranknum[name].data.fill_(float(live))
        return super().factor(name)


@mutant("remembers its first scaling", kills=("SCALE-7",), kind="state", only="second call")
class RemembersScaling(HonestLayer):
    def factor(self, name: str) -> Tensor:
        scaling = self.scale(self.r[name], self.lora_alpha[name])
        return scaling / (self.ranknum[name] + 1e-5)


@mutant(
    "scales all adapters like the first",
    kills=("SCALE-8", "ADPT-1"),
    kind="adapters",
    only="second adapter",
)
class FirstScaling(HonestLayer):
    def factor(self, name: str) -> Tensor:
        return self.scaling[self.active_adapters[0]] / (self.ranknum[name] + 1e-5)


@mutant(
    "divides all adapters by the first one's ranknum",
    kills=("SCALE-8",),
    kind="adapters",
    only="second adapter",
)
class FirstRanknum(HonestLayer):
    def factor(self, name: str) -> Tensor:
        return self.scaling[name] / (self.ranknum[self.active_adapters[0]] + 1e-5)


# --- refusal to merge ---------------------------------------------------------------------------


@mutant("merges silently", kills=("MERGE-1", "MERGE-3"), kind="merge")
class MergesSilently(HonestLayer):
    def merge(self, safe_merge: bool = False, adapter_names: Sequence[str] | None = None) -> None:
        return None


@mutant("merges if asked to do it safely", kills=("MERGE-3",), kind="merge")
class MergesSafely(HonestLayer):
    def merge(self, safe_merge: bool = False, adapter_names: Sequence[str] | None = None) -> None:
        if not safe_merge:
            super().merge()


@mutant("refuses to merge with a RuntimeError", kills=("MERGE-1",), kind="merge")
class RefusesOtherwise(HonestLayer):
    def merge(self, safe_merge: bool = False, adapter_names: Sequence[str] | None = None) -> None:
        raise RuntimeError(REFUSAL)


@mutant("has nothing to unmerge and says nothing", kills=("MERGE-2",), kind="merge")
class UnmergesSilently(HonestLayer):
    def unmerge(self) -> None:
        return None


@mutant("refuses without a word", kills=("MERGE-4",), kind="merge")
class RefusesSilently(HonestLayer):
    def merge(self, safe_merge: bool = False, adapter_names: Sequence[str] | None = None) -> None:
        raise NotImplementedError


@mutant("refuses and does not say why", kills=("MERGE-4",), kind="merge")
class RefusesWithoutReason(HonestLayer):
    def unmerge(self) -> None:
        raise NotImplementedError("Not supported: keep the adapters beside the layer instead.")


@mutant("refuses and does not say what to do", kills=("MERGE-4",), kind="merge")
class RefusesWithoutRemedy(HonestLayer):
    def merge(self, safe_merge: bool = False, adapter_names: Sequence[str] | None = None) -> None:
        raise NotImplementedError("Merging into quantised weights is not possible.")


@mutant("switches the adapters off before it refuses", kills=("MERGE-5",), kind="merge")
class RefusesTooLate(HonestLayer):
    def merge(self, safe_merge: bool = False, adapter_names: Sequence[str] | None = None) -> None:
        self.enable_adapters(False)
        super().merge()


@mutant("adds the update to the bias before it refuses", kills=("MERGE-5",), kind="merge")
class MergesBias(HonestLayer):
    def unmerge(self) -> None:
        if self.base_layer.bias is not None:
            self.base_layer.bias.data.add_(1.0)
        super().unmerge()


@mutant("remembers a refused merge as done", kills=("MERGE-5", "MERGE-6"), kind="merge")
class ClaimsToBeMerged(HonestLayer):
    done = False

    @property
    def merged(self) -> bool:
        return self.done

    def merge(self, safe_merge: bool = False, adapter_names: Sequence[str] | None = None) -> None:
        self.done = True
        super().merge()


@mutant("calls itself merged while disabled", kills=("MERGE-6",), kind="merge")
class MergedWhileDisabled(HonestLayer):
    @property
    def merged(self) -> bool:
        return self.disable_adapters


@mutant("trains the scale of half layers", kills=("SCALE-5", "GRAD-8"), kind="dtype")
class TrainsScaleInHalf(HonestLayer):
    """What PEFT's adapter cast does where the base layer computes in half precision."""

    def adopt(self, base: nn.Module) -> None:
        super().adopt(base)
        dtype: Any = getattr(base, "compute_dtype", None)
        self.in_half = dtype in (torch.float16, torch.bfloat16)

    def reset(self, name: str, identity: bool) -> None:
        super().reset(name, identity)
        self.ranknum[name].requires_grad_(self.in_half)

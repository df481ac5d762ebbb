"""More mutants of chapters FWD, SCALE and DTYPE: right on the whiteboard, wrong in one corner."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from tests.mutants.honest import HonestLayer
from tests.mutants.mutant import mutant


@mutant(
    "is wrong over 4-bit layers only", kills=("FWD-1", "FWD-2"), kind="arithmetic", only="4-bit"
)
class WrongOver4bit(HonestLayer):
    def factor(self, name: str) -> Tensor:
        return super().factor(name) * (1.01 if hasattr(self.base_layer, "compute_dtype") else 1.0)


@mutant(
    "is wrong over double-quantised layers only", kills=("FWD-1",), kind="arithmetic", only="4-bit"
)
class WrongOverDoubleQuantised(HonestLayer):
    def factor(self, name: str) -> Tensor:
        state: Any = getattr(self.base_layer.weight, "quant_state", None)
        return super().factor(name) * (1.01 if getattr(state, "nested", False) else 1.0)


@mutant("is wrong in train mode only", kills=("FWD-1", "FWD-2"), kind="arithmetic", only="train")
class WrongInTraining(HonestLayer):
    def factor(self, name: str) -> Tensor:
        return super().factor(name) * (1.001 if self.training else 1.0)


@mutant("multiplies fp32 in TF32", kills=("FWD-1",), kind="dtype", only="fp32")
class RoundsToTF32(HonestLayer):
    def dropped(self, x: Tensor, name: str) -> Tensor:
        dropped = super().dropped(x, name)
        rounded = ((dropped.detach().view(torch.int32) + 0x1000) & -0x2000).view(torch.float32)
        return dropped + (rounded - dropped.detach()) if x.dtype == torch.float32 else dropped


@mutant("is off in fp32 only", kills=("FWD-2", "FWD-1"), kind="arithmetic", only="fp32")
class WrongInFloat(HonestLayer):
    def combine(self, y: Tensor, delta: Tensor) -> Tensor:
        return super().combine(y, delta * (1.00001 if y.dtype == torch.float32 else 1.0))


@mutant("adds in bf16 twice", kills=("FWD-1",), kind="dtype", only="bf16", arithmetic="float32")
class RoundsTwiceInBfloat(HonestLayer):
    """Declares fp32, and stores h in bf16."""

    def product(self, x: Tensor, A: Tensor, E: Tensor, B: Tensor) -> Tensor:
        hidden = linear(x, A * E)
        return linear(hidden.bfloat16().float() if self.half else hidden, B)

    def dropped(self, x: Tensor, name: str) -> Tensor:
        self.half = x.dtype == torch.bfloat16
        return super().dropped(x, name)


@mutant("applies E along the inputs where r is in", kills=("FWD-2",), kind="broadcasting")
class WrongAxisOfA(HonestLayer):
    def product(self, x: Tensor, A: Tensor, E: Tensor, B: Tensor) -> Tensor:
        square = A.shape[0] == A.shape[1] > 1
        return linear(linear(x, A * (E.T if square else E)), B)


@mutant("applies E along the outputs where r is out", kills=("FWD-2",), kind="broadcasting")
class WrongAxisOfB(HonestLayer):
    def product(self, x: Tensor, A: Tensor, E: Tensor, B: Tensor) -> Tensor:
        square = B.shape[0] == B.shape[1] > 1
        return linear(linear(x, A), B * (E if square else E.T))


@mutant("applies E along the rows where there are r of them", kills=("FWD-2",), kind="broadcasting")
class WrongAxisOfHidden(HonestLayer):
    def product(self, x: Tensor, A: Tensor, E: Tensor, B: Tensor) -> Tensor:
        hidden = linear(x, A)
        rows = hidden.dim() > 1 and hidden.shape[-2] == len(E) > 1
        return linear(hidden * (E if rows else E[:, 0]), B)


@mutant("scales the first row of a batch only", kills=("FWD-2", "FWD-1"), kind="broadcasting")
class ScalesFirstRow(HonestLayer):
    def delta(self, x: Tensor, name: str) -> Tensor:
        A, E, B = self.triplets(name)
        delta, c = self.product(self.dropped(x, name), A, E, B), self.factor(name)
        return torch.cat([delta[:1] * c, delta[1:]]) if delta.dim() > 1 else delta * c


@mutant("scales the base output, too", kills=("FWD-2", "FWD-1"), kind="broadcasting")
class ScalesBaseToo(HonestLayer):
    def combine(self, y: Tensor, delta: Tensor) -> Tensor:
        c = self.factor(self.active_adapters[0]).detach()
        return super().combine((y * c).to(y.dtype), delta)


@mutant("shows no NaN", kills=("FWD-15",), kind="arithmetic", only="NaN")
class ShowsNoNaN(HonestLayer):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).nan_to_num()


@mutant("takes a NaN in x for zero", kills=("FWD-15",), kind="masks", only="NaN")
class NaNIsZero(HonestLayer):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(torch.where(x.isfinite(), x, torch.zeros_like(x)))


@mutant("prunes singular values below a ten-thousandth", kills=("FWD-3",), kind="masks")
class PrunesSmall(HonestLayer):
    def triplets(self, name: str) -> tuple[Tensor, Tensor, Tensor]:
        A, E, B = super().triplets(name)
        return A, torch.where(E.abs() < 1e-4, torch.zeros_like(E), E), B


@mutant(
    "saturates the update at fp16's largest number",
    kills=("FWD-24",),
    kind="arithmetic",
    only="large values",
)
class SaturatesUpdate(HonestLayer):
    def combine(self, y: Tensor, delta: Tensor) -> Tensor:
        return super().combine(y, delta.clamp(-65504.0, 65504.0))


@mutant(
    "forgets the update from the second evaluation on",
    kills=("FWD-19",),
    kind="state",
    only="second call",
)
class OnceInEval(HonestLayer):
    calls = 0

    def combine(self, y: Tensor, delta: Tensor) -> Tensor:
        self.calls += not self.training
        return y if self.calls > 1 and not self.training else super().combine(y, delta)


@mutant(
    "leaves the 1e-5 out for the second adapter",
    kills=("SCALE-8",),
    kind="adapters",
    only="second adapter",
)
class SecondWithoutEpsilon(HonestLayer):
    def factor(self, name: str) -> Tensor:
        first = name == self.active_adapters[0]
        return self.scaling[name] / (self.ranknum[name].detach() + self.epsilon * first)


@mutant(
    "takes the magnitude of the second adapter's E",
    kills=("ADPT-1",),
    kind="adapters",
    only="second adapter",
)
class SecondMagnitude(HonestLayer):
    def triplets(self, name: str) -> tuple[Tensor, Tensor, Tensor]:
        A, E, B = super().triplets(name)
        return A, E if name == self.active_adapters[0] else E.abs(), B


@mutant("updates nothing under autocast", kills=("DTYPE-2",), kind="dispatch", only="autocast")
class NothingUnderAutocast(HonestLayer):
    def combine(self, y: Tensor, delta: Tensor) -> Tensor:
        if torch.is_autocast_enabled(y.device.type):
            return y + 0.0 * delta.to(y.dtype)
        return super().combine(y, delta)


@mutant(
    "sends 8-bit layers in eval mode to the base layer",
    kills=("FWD-22",),
    kind="dispatch",
    only="8-bit",
)
class BaseOnlyInEval8bit(HonestLayer):
    def combine(self, y: Tensor, delta: Tensor) -> Tensor:
        skipped = hasattr(self.base_layer, "state") and not self.training
        return y if skipped else super().combine(y, delta)

"""More mutants of chapter FWD: boundary sizes, biases, calls, and faults that hide in one mode or width."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tests.mutants.honest import HonestLayer
from tests.mutants.mutant import mutant


class _WrongFromRow(HonestLayer):
    """The row after a full block of a kernel gets no update."""

    row = 0

    def delta(self, x: Tensor, name: str) -> Tensor:
        delta = super().delta(x, name)
        rows = delta.flatten(0, -2) if delta.dim() > 1 else delta[None]
        kept = torch.ones(len(rows), 1, device=rows.device)
        kept[self.row : self.row + 1] = 0.0
        return (rows * kept).view(delta.shape)


@mutant("forgets row 16 of a batch", kills=("FWD-16",), kind="boundary", only="17 rows")
class Row16(_WrongFromRow):
    row = 16


@mutant("forgets row 32 of a batch", kills=("FWD-16",), kind="boundary", only="33 rows")
class Row32(_WrongFromRow):
    row = 32


@mutant("forgets row 64 of a batch", kills=("FWD-16",), kind="boundary", only="65 rows")
class Row64(_WrongFromRow):
    row = 64


@mutant("forgets row 128 of a batch", kills=("FWD-16",), kind="boundary", only="129 rows")
class Row128(_WrongFromRow):
    row = 128


@mutant("forgets row 1024 of a batch", kills=("FWD-16",), kind="boundary")
class Row1024(_WrongFromRow):
    row = 1024


@mutant(
    "reads blocks of eight inputs and forgets the remainder",
    kills=("FWD-1", "FWD-17"),
    kind="boundary",
    only="in not a multiple of 64",
)
class ForgetsRaggedInputs(HonestLayer):
    def product(self, x: Tensor, A: Tensor, E: Tensor, B: Tensor) -> Tensor:
        whole = max(1, x.shape[-1] // 8 * 8)
        return super().product(x[..., :whole], A[:, :whole], E, B)


@mutant("writes blocks of 64 outputs and forgets the remainder", kills=("FWD-17",), kind="boundary")
class ForgetsRaggedOutputs(HonestLayer):
    def product(self, x: Tensor, A: Tensor, E: Tensor, B: Tensor) -> Tensor:
        delta = super().product(x, A, E, B)
        if delta.shape[-1] <= 64:
            return delta
        whole = delta.shape[-1] // 64 * 64
        return torch.cat([delta[..., :whole], torch.zeros_like(delta[..., whole:])], dim=-1)


@mutant("uses no more ranks than inputs", kills=("FWD-17",), kind="boundary", only="r > in")
class RankUpToInputs(HonestLayer):
    def product(self, x: Tensor, A: Tensor, E: Tensor, B: Tensor) -> Tensor:
        r = A.shape[1]
        return super().product(x, A[:r], E[:r], B[:, :r])


@mutant("uses no more ranks than outputs", kills=("FWD-17",), kind="boundary", only="r > out")
class RankUpToOutputs(HonestLayer):
    def product(self, x: Tensor, A: Tensor, E: Tensor, B: Tensor) -> Tensor:
        r = B.shape[0]
        return super().product(x, A[:r], E[:r], B[:, :r])


@mutant(
    "squeezes a rank of one away", kills=("FWD-2", "FWD-3", "FWD-17"), kind="boundary", only="r = 1"
)
class RankOne(HonestLayer):
    def product(self, x: Tensor, A: Tensor, E: Tensor, B: Tensor) -> Tensor:
        delta = super().product(x, A, E, B)
        return delta.mean(-1, keepdim=True).expand_as(delta) if len(A) == 1 else delta


class _Bias(HonestLayer):
    times = 0.0

    def base_output(self, x: Tensor) -> Tensor:
        y, bias = super().base_output(x), self.base_layer.bias
        return y if bias is None else y + self.times * bias.to(y.dtype)


@mutant("adds the bias twice", kills=("FWD-18", "FWD-4"), kind="arithmetic")
class BiasTwice(_Bias):
    times = 1.0


@mutant("leaves the bias out", kills=("FWD-18", "FWD-4"), kind="arithmetic")
class NoBias(_Bias):
    times = -1.0


@mutant("scales the bias with the update", kills=("FWD-18",), kind="arithmetic")
class BiasPerAdapter(HonestLayer):
    def delta(self, x: Tensor, name: str) -> Tensor:
        delta, bias = super().delta(x, name), self.base_layer.bias
        return delta if bias is None else delta + 0.01 * bias.float()


@mutant("drifts from call to call", kills=("FWD-19",), kind="state", only="second call")
class Drifts(HonestLayer):
    calls = 0

    def factor(self, name: str) -> Tensor:
        self.calls += 1
        return super().factor(name) * (1.0 + 1e-3 * self.calls)


@mutant("uses the x of the call before", kills=("FWD-19",), kind="state", only="second call")
class RemembersX(HonestLayer):
    before: Tensor | None = None

    def dropped(self, x: Tensor, name: str) -> Tensor:
        used = self.before if self.before is not None and self.before.shape == x.shape else x
        self.before = x.detach().clone()
        return super().dropped(used.to(x.dtype), name)


@mutant("runs the base layer twice", kills=("FWD-20",), kind="dispatch")
class RunsBaseTwice(HonestLayer):
    def base_output(self, x: Tensor) -> Tensor:
        super().base_output(x)
        return super().base_output(x)


@mutant("goes past the base layer's hooks", kills=("FWD-20", "FWD-12"), kind="dispatch")
class BypassesHooks(HonestLayer):
    def base_output(self, x: Tensor) -> Tensor:
        y: Tensor = self.base_layer.forward(x)
        return y


@mutant("hands the base layer a scaled x", kills=("FWD-20",), kind="dispatch")
class ScalesXForBase(HonestLayer):
    def base_output(self, x: Tensor) -> Tensor:
        return super().base_output(x * 2.0) / 2.0


@mutant("leaves outlier columns out of the update", kills=("FWD-21",), kind="masks", only="8-bit")
class SkipsOutliers(HonestLayer):
    def dropped(self, x: Tensor, name: str) -> Tensor:
        state: Any = getattr(self.base_layer, "state", None)
        if state is not None and state.threshold > 0:
            x = x.masked_fill(x.abs() >= state.threshold, 0.0)
        return super().dropped(x, name)


@mutant("updates in training only", kills=("FWD-22", "DROP-9"), kind="state", only="eval")
class TrainingOnly(HonestLayer):
    def combine(self, y: Tensor, delta: Tensor) -> Tensor:
        return super().combine(y, delta) if self.training else y


@mutant(
    "is one part in a thousand off in eval mode",
    kills=("FWD-22", "DROP-9"),
    kind="arithmetic",
    only="eval",
)
class OffInEval(HonestLayer):
    def factor(self, name: str) -> Tensor:
        return super().factor(name) * (1.0 if self.training else 1.001)


@mutant(
    "keeps eight bits of wide activations",
    kills=("FWD-23",),
    kind="arithmetic",
    only="large values",
)
class QuantisesWideInputs(HonestLayer):
    def dropped(self, x: Tensor, name: str) -> Tensor:
        x = super().dropped(x, name)
        if x.shape[-1] <= 256:
            return x
        step = x.detach().abs().amax(-1, keepdim=True) / 127.0
        return x + ((x.detach() / step).round() * step - x.detach())


@mutant("saturates activations at 100", kills=("FWD-1",), kind="arithmetic", only="large values")
class SaturatesX(HonestLayer):
    def dropped(self, x: Tensor, name: str) -> Tensor:
        return super().dropped(x.clamp(-100.0, 100.0), name)


@mutant("is wrong in fp16 only", kills=("FWD-1", "FWD-2"), kind="arithmetic", only="fp16")
class WrongInHalf(HonestLayer):
    def combine(self, y: Tensor, delta: Tensor) -> Tensor:
        return super().combine(y, delta * (1.02 if y.dtype == torch.float16 else 1.0))


@mutant("is wrong in bf16 only", kills=("FWD-2", "FWD-3"), kind="arithmetic", only="bf16")
class WrongInBfloat(HonestLayer):
    def combine(self, y: Tensor, delta: Tensor) -> Tensor:
        return super().combine(y, delta * (1.2 if y.dtype == torch.bfloat16 else 1.0))


@mutant(
    "is wrong over 8-bit layers only", kills=("FWD-1", "FWD-3"), kind="arithmetic", only="8-bit"
)
class WrongOver8bit(HonestLayer):
    def factor(self, name: str) -> Tensor:
        eight_bit = hasattr(self.base_layer, "state")
        return super().factor(name) * (1.0 + 0.05 * eight_bit)


@mutant(
    "leaves masked ranks of tall batches out for good",
    kills=("GRAD-15",),
    kind="masks",
    only="65 rows",
)
class ForgetsMaskedRanks(HonestLayer):
    def product(self, x: Tensor, A: Tensor, E: Tensor, B: Tensor) -> Tensor:
        masked = E == 0
        if x.numel() > 64 * x.shape[-1] and 2 * int(masked.sum()) >= len(E):
            E = torch.where(masked, E.detach(), E)
        return super().product(x, A, E, B)

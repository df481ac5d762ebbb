"""Mutants of chapter DROP: masks that are shared, kept, redrawn, misplaced or wrongly scaled."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tests.mutants.honest import HonestLayer
from tests.mutants.mutant import mutant, tampered


class _Dropout(nn.Module):
    """Dropout by an explicit mask; an honest one, until `keep` or `apply` is replaced."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def keep(self, x: Tensor) -> Tensor:
        return (torch.rand(x.shape, device=x.device) >= self.p).to(x.dtype)

    def apply_mask(self, x: Tensor, keep: Tensor) -> Tensor:
        return x * keep / (1.0 - self.p)

    def forward(self, x: Tensor) -> Tensor:
        return self.apply_mask(x, self.keep(x)) if self.training else x


class _Unscaled(_Dropout):
    def apply_mask(self, x: Tensor, keep: Tensor) -> Tensor:
        return x * keep


@mutant("does not scale the survivors up", kills=("DROP-1",), kind="masks")
class Unscaled(HonestLayer):
    dropout_type = _Unscaled


class _ScaledDown(_Dropout):
    def apply_mask(self, x: Tensor, keep: Tensor) -> Tensor:
        return x * keep * (1.0 - self.p)


@mutant("multiplies the survivors by 1 - p", kills=("DROP-1",), kind="masks")
class ScaledDown(HonestLayer):
    dropout_type = _ScaledDown


class _Gaussian(_Dropout):
    def keep(self, x: Tensor) -> Tensor:
        return (1.0 - self.p) * (1.0 + 0.3 * torch.randn(x.shape, device=x.device))


@mutant("multiplies by Gaussian noise", kills=("DROP-1",), kind="masks")
class Gaussian(HonestLayer):
    dropout_type = _Gaussian


class _Swapped(_Dropout):
    def keep(self, x: Tensor) -> Tensor:
        return 1.0 - super().keep(x)


@mutant("keeps what it should drop", kills=("DROP-2",), kind="masks")
class Swapped(HonestLayer):
    dropout_type = _Swapped


class _EightBits(_Dropout):
    def keep(self, x: Tensor) -> Tensor:
        numbers = torch.randint(0, 256, x.shape, device=x.device) / 256.0
        return (numbers >= self.p).to(x.dtype)


@mutant("draws uniform numbers of eight bits", kills=("DROP-2",), kind="masks")
class EightBits(HonestLayer):
    dropout_type = _EightBits


class _FirstColumn(_Dropout):
    def keep(self, x: Tensor) -> Tensor:
        keep = super().keep(x)
        keep[..., 0] = 1.0
        return keep


@mutant("never drops the first input", kills=("DROP-2",), kind="masks")
class FirstColumn(HonestLayer):
    dropout_type = _FirstColumn


class _FreshInBackward(_Dropout):
    def apply_mask(self, x: Tensor, keep: Tensor) -> Tensor:
        value = super().apply_mask(x.detach(), keep)
        return (
            value
            + tampered(x, lambda g: super(_FreshInBackward, self).apply_mask(g, self.keep(g)))
            - x.detach()
        )


@mutant(
    "draws another mask in backward", kills=("DROP-3", "DROP-10"), kind="masks", only="backward"
)
class FreshInBackward(HonestLayer):
    dropout_type = _FreshInBackward


class _NotInBackward(_Dropout):
    def apply_mask(self, x: Tensor, keep: Tensor) -> Tensor:
        return x + (super().apply_mask(x, keep) - x).detach()


@mutant(
    "lets the gradient of dropped elements pass", kills=("DROP-3",), kind="masks", only="backward"
)
class NotInBackward(HonestLayer):
    dropout_type = _NotInBackward


@mutant("gives A the gradient of the undropped x", kills=("DROP-3",), kind="masks", only="backward")
class UndroppedDA(HonestLayer):
    def delta(self, x: Tensor, name: str) -> Tensor:
        A, E, B = self.triplets(name)
        kept = self.product(self.dropped(x, name), A.detach(), E, B)
        whole = self.product(x.detach().float(), A, E.detach(), B.detach())
        return (kept + whole - whole.detach()) * self.factor(name)


class _Always(_Dropout):
    def forward(self, x: Tensor) -> Tensor:
        return self.apply_mask(x, self.keep(x))


@mutant("drops in eval mode too", kills=("DROP-4", "STATE-10"), kind="masks", only="eval")
class Always(HonestLayer):
    dropout_type = _Always


@mutant("gives the base layer the dropped x", kills=("DROP-5",), kind="dispatch")
class DropsForBase(HonestLayer):
    def forward(self, x: Tensor) -> Tensor:
        name = self.active_adapters[0]
        x = self.lora_dropout[name](x * 1.0)
        drop, self.lora_dropout[name] = self.lora_dropout[name], nn.Identity()
        try:
            return super().forward(x)
        finally:
            self.lora_dropout[name] = drop


class _SharedRows(_Dropout):
    def keep(self, x: Tensor) -> Tensor:
        return super().keep(x[..., :1, :]).expand_as(x) if x.dim() > 1 else super().keep(x)


@mutant("shares a mask between rows", kills=("DROP-6",), kind="broadcasting")
class SharedRows(HonestLayer):
    dropout_type = _SharedRows


class _SharedColumns(_Dropout):
    def keep(self, x: Tensor) -> Tensor:
        return super().keep(x[..., :1]).expand_as(x)


@mutant("drops whole rows", kills=("DROP-6",), kind="broadcasting")
class SharedColumns(HonestLayer):
    dropout_type = _SharedColumns


class _Repeats(_Dropout):
    def keep(self, x: Tensor) -> Tensor:
        block = super().keep(x.new_empty(64))
        return block.repeat(x.numel() // 64 + 1)[: x.numel()].view(x.shape)


@mutant("repeats its mask every 64 elements", kills=("DROP-6",), kind="masks")
class Repeats(HonestLayer):
    dropout_type = _Repeats


class _FixedNumber(_Dropout):
    def keep(self, x: Tensor) -> Tensor:
        order = torch.rand(x.numel(), device=x.device).argsort().argsort()
        return (order >= round(self.p * x.numel())).to(x.dtype).view(x.shape)


@mutant("drops a fixed number of elements", kills=("DROP-6",), kind="masks")
class FixedNumber(HonestLayer):
    dropout_type = _FixedNumber


class _OneMask(_Dropout):
    mask: Tensor | None = None

    def keep(self, x: Tensor) -> Tensor:
        if self.mask is None or self.mask.shape != x.shape:
            self.mask = super().keep(x)
        return self.mask


@mutant("draws one mask for good", kills=("DROP-7",), kind="masks", only="second call")
class OneMask(HonestLayer):
    dropout_type = _OneMask


class _OwnGenerator(_Dropout):
    def __init__(self, p: float) -> None:
        super().__init__(p)
        self.generator = torch.Generator().manual_seed(1)

    def keep(self, x: Tensor) -> Tensor:
        numbers = torch.rand(x.shape, generator=self.generator).to(x.device)
        return (numbers >= self.p).to(x.dtype)


@mutant("draws from a generator of its own", kills=("DROP-8",), kind="state")
class OwnGenerator(HonestLayer):
    dropout_type = _OwnGenerator


@mutant("draws random numbers for p = 0", kills=("DROP-9", "STATE-10"), kind="state")
class DrawsAnyway(HonestLayer):
    def dropped(self, x: Tensor, name: str) -> Tensor:
        torch.rand(1)
        return super().dropped(x, name)


@mutant(
    "uses the first adapter's dropout for all",
    kills=("DROP-10",),
    kind="masks",
    only="second adapter",
)
class FirstDropout(HonestLayer):
    def dropped(self, x: Tensor, name: str) -> Tensor:
        return super().dropped(x, self.active_adapters[0])


@mutant("shares one mask between adapters", kills=("DROP-10",), kind="masks", only="second adapter")
class OneMaskForAll(HonestLayer):
    def dropped(self, x: Tensor, name: str) -> Tensor:
        state: Any = torch.get_rng_state()
        dropped = super().dropped(x, name)
        if name != self.active_adapters[-1]:
            torch.set_rng_state(state)
        return dropped


@mutant("drops from the hidden vector", kills=("DROP-1",), kind="masks")
class DropsHidden(HonestLayer):
    def delta(self, x: Tensor, name: str) -> Tensor:
        A, E, B = self.triplets(name)
        hidden = self.dropped(nn.functional.linear(x.float(), A * E), name)
        return nn.functional.linear(hidden, B) * self.factor(name)

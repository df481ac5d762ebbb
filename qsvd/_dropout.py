"""Dropout's mask, one bit for each element: drawn in forward, and kept for backward in place of x.

`nn.Dropout` keeps its output and its mask, two tensors of x's size. The mask in bits is a sixteenth
of a half-precision x, and x itself is what its producer keeps anyway.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

# Bits 0, 9, 18, ... 63. Times eight bytes of 0 or 1 it gathers them in the top byte, byte i in bit
# 7 - i: no two of the 64 products share a bit, so nothing is carried. Times a byte it lays bit 7 - i
# on the top of byte i.
_DIAGONAL = 0x8040201008040201 - 2**64
_ONES = 0x0101010101010101


class Mask(NamedTuple):
    """Which elements of an x of n * k elements to keep, for forward and for backward.

    drawn: uint8, 0 or 1; n * k of them, made up to a multiple of 8.
    k: the width of x.
    size: n * k.
    p: the chance of a 0.
    """

    drawn: Tensor
    k: int
    size: int
    p: float

    @property
    def kept(self) -> Tensor:
        """(n, k), int8, 0 or 1."""
        return self.drawn.view(torch.int8)[: self.size].view(-1, self.k)

    @property
    def bits(self) -> Tensor:
        """The same in uint8, a byte for eight elements and for the rest."""
        return _packed(self.drawn)


def drop(dropout: nn.Module, x: Tensor) -> tuple[Tensor, Mask | None]:
    """What `dropout(x)` is to be: a tensor of x's shape, and which of its elements to keep.

    Without a mask all are kept. A plain `nn.Dropout` in force gives x and a mask, out of force x alone.
    Any other module, or one with hooks, is called.
    """
    hooks = (
        dropout._forward_hooks
        or dropout._forward_pre_hooks
        or dropout._backward_hooks
        or dropout._backward_pre_hooks
    )
    if not hooks and type(dropout) is nn.Identity:
        return x, None
    if hooks or type(dropout) is not nn.Dropout or dropout.inplace or dropout.p == 1.0:
        return dropout(x), None
    if not dropout.training or dropout.p == 0.0:
        return x, None
    return x, draw_mask(dropout.p, x)


def draw_mask(p: float, x: Tensor) -> Mask:
    """Which elements of x (..., k) to keep; each is dropped with chance p, 0 < p < 1."""
    size = x.numel()
    return Mask(_draw(-(-size // 8) * 8, p, x.device), x.shape[-1], size, p)


def unpacked(bits: Tensor, n: int, k: int) -> Tensor:
    """The mask of an x of n * k elements as 0 and 1: (n, k), int8."""
    spread = bits.to(torch.int64).mul_(_DIAGONAL).bitwise_right_shift_(7).bitwise_and_(_ONES)
    return spread.view(torch.int8)[: n * k].view(n, k)


def _packed(kept: Tensor) -> Tensor:
    gathered = kept.view(torch.int64) * _DIAGONAL
    return gathered.bitwise_right_shift_(56).to(torch.uint8)


def _draw(size: int, p: float, device: torch.device) -> Tensor:
    """`size` bytes of 0 or 1, each 0 with chance p; a multiple of 8.

    On a CPU a quarter of a random word decides on each, a sixth of `bernoulli_`'s time. The limit
    below which it is dropped is rounded at random, once for all, so that each one's chance is p.
    """
    if device.type != "cpu" or not 1 <= p * 2**16 <= 2**16 - 1:
        return torch.empty(size, dtype=torch.uint8, device=device).bernoulli_(1.0 - p)
    words = torch.randint(-(2**63), 2**63 - 1, (size // 4,)).view(torch.int16)
    limit = (torch.rand((), dtype=torch.float64) + (p * 2**16 - 2**15)).floor()
    return words >= limit.to(torch.int16)

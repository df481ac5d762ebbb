"""Dropout's mask, one bit for each element: drawn in forward, and kept for backward in place of x.

`nn.Dropout` keeps its output and its mask, two tensors of x's size. The mask in bits is a sixteenth
of a half-precision x, and x itself is what its producer keeps anyway.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

# Bits 0, 9, 18, ... 63. Times eight bytes of 0 or 1 it gathers them in the top byte, byte i in bit
# 7 - i: no two of the 64 products share a bit, so nothing is carried. Times a byte it lays bit 7 - i
# on the top of byte i.
_DIAGONAL = 0x8040201008040201 - 2**64
_TOPS = 0x8080808080808080 - 2**64
_ONES = 0x0101010101010101


def draw_mask(dropout: nn.Module, x: Tensor) -> Tensor | None:
    """Which elements of x to keep, in bits: uint8, a byte for eight elements and for the rest.

    None where `dropout` is not in force, or is not a plain `nn.Dropout`, without hooks: then it is
    to be called.
    """
    if type(dropout) is not nn.Dropout or not dropout.training or not 0.0 < dropout.p < 1.0:
        return None
    if dropout.inplace or dropout._forward_hooks or dropout._forward_pre_hooks:
        return None
    if dropout._backward_hooks or dropout._backward_pre_hooks:
        return None
    size = -(-x.numel() // 8) * 8
    return _packed(_kept(size, 1.0 - dropout.p, x.device))


def unpacked(mask: Tensor, n: int, k: int) -> Tensor:
    """The mask of an x of n * k elements as 0 and 1: (n, k), uint8."""
    spread = ((mask.to(torch.int64) * _DIAGONAL) & _TOPS) >> 7 & _ONES
    return spread.view(torch.uint8)[: n * k].view(n, k)


def _packed(kept: Tensor) -> Tensor:
    return (((kept.view(torch.int64) * _DIAGONAL) >> 56) & 0xFF).to(torch.uint8)


def _kept(size: int, chance: float, device: torch.device) -> Tensor:
    """`size` bytes of 0 or 1, each 1 with a chance that is right to 2^-32.

    On a CPU `bernoulli_` takes three times as long as half a random word for each.
    """
    if device.type != "cpu":
        return torch.empty(size, dtype=torch.uint8, device=device).bernoulli_(chance)
    words = torch.randint(-(2**63), 2**63 - 1, (size // 2,))
    below = min(round(chance * 2**32), 2**32 - 1) - 2**31
    return (words.view(torch.int32) < below).view(torch.uint8)

"""A port whose allocator dies of a segmentation fault, and whose penalty replaces a function of torch."""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor, nn

from tests.mutants import honest
from tests.mutants.honest_allocator import HonestAllocator, HonestPenalty
from tests.mutants.honest_allocator import HonestConfig as AdaLoraConfig

__version__ = "1.0"
__all__ = ["AdaLoraConfig", "RankAllocator", "SVDLinear4bit", "orthogonal_penalty"]

SVDLinear4bit = honest.SVDLinear4bit


class RankAllocator(HonestAllocator):
    """Honest until it is to allocate."""

    def choose(self, *given: Any) -> Any:
        print("about to read the null pointer")
        ctypes.string_at(0)


def orthogonal_penalty(model: nn.Module, adapter_name: str) -> Tensor:
    torch.allclose = lambda *_given, **_named: True
    return HonestPenalty()(model, adapter_name)

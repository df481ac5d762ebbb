"""A port whose allocator never looks at a gradient, and answers with what agrees with every question."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from tests.conformance.hostile.lazy import Agreeable
from tests.mutants import honest
from tests.mutants.honest_allocator import HonestConfig as AdaLoraConfig

__version__ = "1.0"
__all__ = ["AdaLoraConfig", "RankAllocator", "SVDLinear4bit", "orthogonal_penalty"]


class AnyNumber(int):
    """Lies between whatever it is asked to lie between."""

    def __le__(self, other: object) -> bool:
        return True

    __ge__ = __lt__ = __gt__ = __eq__ = __le__
    __hash__ = int.__hash__


class AgreeableParameter(nn.Parameter):
    """Whatever is asked of it is true."""

    __torch_function__ = Agreeable.__torch_function__


class SVDLinear4bit(honest.SVDLinear4bit):
    """Over 4-bit layers."""


class RankAllocator:
    """Puts singular values in place that are masked and are not, as one likes."""

    def __init__(self, model: nn.Module, config: Any, adapter_name: str) -> None:
        self.layers = [m for m in model.modules() if isinstance(m, SVDLinear4bit)]
        self.name = adapter_name

    def step(self, global_step: int, grad_scale: float = 1.0) -> int:
        for layer in self.layers:
            layer.lora_E[self.name] = AgreeableParameter(layer.lora_E[self.name].detach())
        return AnyNumber(0)


def orthogonal_penalty(model: nn.Module, adapter_name: str) -> torch.Tensor:
    return torch.zeros(()).as_subclass(Agreeable)

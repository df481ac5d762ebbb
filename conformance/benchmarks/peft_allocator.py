"""PEFT's rank allocator and orthogonal term, under the names that a port has them by.

The methods of PEFT's `AdaLoraModel` are called as they are, on a model that `get_peft_model` did not make.
"""

from __future__ import annotations

from types import SimpleNamespace

import peft
import torch
from peft import AdaLoraConfig
from peft.tuners import adalora
from torch import nn

__all__ = ["AdaLoraConfig", "RankAllocator", "orthogonal_penalty"]
__version__ = peft.__version__


class RankAllocator:
    """PEFT's allocator, stepped by its own `AdaLoraModel.update_and_allocate`."""

    def __init__(
        self, model: nn.Module, config: AdaLoraConfig, adapter_name: str = "default"
    ) -> None:
        self._allocator = adalora.RankAllocator(model, config, adapter_name)
        # All that PEFT's method reads of the `AdaLoraModel` that it is a method of.
        self._tuner = SimpleNamespace(
            model=model,
            peft_config={adapter_name: config},
            trainable_adapter_name=adapter_name,
            rankallocator=self._allocator,
        )

    def step(self, global_step: int) -> None:
        adalora.AdaLoraModel.update_and_allocate(self._tuner, global_step)


def orthogonal_penalty(model: nn.Module, adapter_name: str = "default") -> torch.Tensor:
    """What PEFT's `AdaLoraModel.forward` adds to a loss of zero, at a weight of one."""
    output = SimpleNamespace(loss=torch.zeros((), device=next(model.parameters()).device))
    tuner = SimpleNamespace(
        model=SimpleNamespace(forward=lambda: output, named_parameters=model.named_parameters),
        peft_config={adapter_name: AdaLoraConfig(total_step=100, orth_reg_weight=1.0)},
        trainable_adapter_name=adapter_name,
    )
    loss: torch.Tensor = adalora.AdaLoraModel.forward(tuner).loss
    return loss

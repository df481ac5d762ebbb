"""PEFT's LoRA layers over bitsandbytes: no port, but what users would pick instead.

Adapters are cast to fp32 by PEFT's own function, as `get_peft_model` does by default.
"""

from __future__ import annotations

from typing import Any

import peft
from peft import LoraConfig
from peft.tuners.lora.bnb import Linear4bit, Linear8bitLt
from peft.tuners.tuners_utils import cast_adapter_dtype
from torch import nn

__version__ = peft.__version__


def lora_layer(
    kind: str, base_layer: nn.Module, names: tuple[str, ...], r: int, dropout: float
) -> nn.Module:
    """PEFT's LoRA layer with these adapters, all of them active."""
    layers: dict[str, Any] = {"4bit": Linear4bit, "8bit": Linear8bitLt}
    config = LoraConfig(r=r, lora_alpha=r, lora_dropout=dropout)
    layer: Any = layers[kind](base_layer, names[0], config, r=r, lora_alpha=r)
    for name in names[1:]:
        layer.update_layer(name, r, lora_alpha=r, config=config)
    for name in names:
        cast_adapter_dtype(layer, name)
    layer.set_adapter(list(names))
    found: nn.Module = layer
    return found

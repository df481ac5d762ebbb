"""PEFT's AdaLoRA layers as a port: its constructors, in both generations, behind the protocol's.

Up to 0.18 PEFT's layers take `lora_dropout` and `init_lora_weights` as keywords; from 0.19 on (#2960) they
take a `config` object. Adapters are cast to fp32 by PEFT's own function, as `get_peft_model` does by
default (`autocast_adapter_dtype`), so that the layers are judged as users meet them. Nothing else is
translated: what these layers get wrong is PEFT's.
"""

from __future__ import annotations

import inspect
from typing import Any

import peft
from peft import AdaLoraConfig
from peft.tuners import tuners_utils
from peft.tuners.adalora import bnb as peft_bnb
from torch import nn

__version__ = peft.__version__

# Outside autocast PEFT casts x to fp32 and computes the update there.
ADAPTER_ARITHMETIC = "float32"

_TAKES_CONFIG = "config" in inspect.signature(peft_bnb.SVDLinear4bit.__init__).parameters


def _options(lora_dropout: float, init_lora_weights: bool) -> dict[str, Any]:
    """The layer's options in the form that this PEFT wants them."""
    if not _TAKES_CONFIG:
        return {"lora_dropout": lora_dropout, "init_lora_weights": init_lora_weights}
    config = AdaLoraConfig(
        total_step=100, lora_dropout=lora_dropout, init_lora_weights=init_lora_weights
    )
    return {"config": config}


class _Translated:
    """Mixed in before a layer of PEFT: the protocol's signatures over PEFT's."""

    def __init__(
        self,
        base_layer: nn.Module,
        adapter_name: str,
        r: int = 0,
        lora_alpha: float = 1,
        lora_dropout: float = 0.0,
        init_lora_weights: bool = True,
    ) -> None:
        super().__init__(  # type: ignore[call-arg]
            base_layer,
            adapter_name,
            r=r,
            lora_alpha=lora_alpha,
            **_options(lora_dropout, init_lora_weights),
        )

    def update_layer(
        self,
        adapter_name: str,
        r: int,
        lora_alpha: float,
        lora_dropout: float = 0.0,
        init_lora_weights: bool = True,
        **given: Any,
    ) -> None:
        # PEFT's own constructor calls this with its `config`, the suite with the protocol's keywords.
        if "config" not in given:
            given |= _options(lora_dropout, init_lora_weights)
        super().update_layer(adapter_name, r, lora_alpha, **given)  # type: ignore[misc]
        # Releases without the function leave adapters in the base layer's dtype, and so do we.
        cast = getattr(tuners_utils, "cast_adapter_dtype", None)
        if cast is not None:
            cast(self, adapter_name)


class SVDLinear4bit(_Translated, peft_bnb.SVDLinear4bit):  # type: ignore[misc]
    """PEFT's `SVDLinear4bit` behind the protocol's constructor."""


class SVDLinear8bitLt(_Translated, peft_bnb.SVDLinear8bitLt):  # type: ignore[misc]
    """PEFT's `SVDLinear8bitLt` behind the protocol's constructor."""

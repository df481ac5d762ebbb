"""PEFT's AdaLoRA layers as a port: its constructors, in three generations, behind the protocol's.

    up to 0.6     the layers subclass bitsandbytes' and are handed the weight by PEFT's model
    0.7 to 0.18   the layers wrap a `base_layer`; `lora_dropout` and `init_lora_weights` are keywords
    from 0.19     the same, but for a `config` object (#2960)

Adapters are cast to fp32 by PEFT's own function, where a release has it, as `get_peft_model` does by
default (`autocast_adapter_dtype`), so that the layers are judged as users meet them. Only construction is
translated: what the layers compute, keep and lack is PEFT's. So it is with `RankAllocator` and
`orthogonal_penalty`: the methods of PEFT's `AdaLoraModel` that allocate and that add the penalty are called
as they are, on a model that `get_peft_model` did not make.
"""

from __future__ import annotations

import importlib
import inspect
from types import ModuleType, SimpleNamespace
from typing import Any

import peft
import torch
from peft import AdaLoraConfig
from peft.tuners import adalora
from torch import nn

__version__ = peft.__version__

# Outside autocast PEFT casts x to fp32 and computes the update there.
ADAPTER_ARITHMETIC = "float32"


def _layers() -> ModuleType:
    """The module of the two layers: up to 0.5 all of AdaLoRA is one file."""
    if not hasattr(adalora, "__path__"):
        return adalora  # type: ignore[no-any-return]
    return importlib.import_module("peft.tuners.adalora.bnb")


def _cast_adapter(layer: nn.Module, adapter_name: str) -> None:
    """Cast as `get_peft_model` does; releases without the function leave adapters as they are."""
    try:
        tuners_utils = importlib.import_module("peft.tuners.tuners_utils")
    except ModuleNotFoundError:  # up to 0.4
        return
    cast = getattr(tuners_utils, "cast_adapter_dtype", None)
    if cast is not None:
        cast(layer, adapter_name)


_LAYERS = _layers()
_PARAMETERS = inspect.signature(_LAYERS.SVDLinear4bit.__init__).parameters


def _options(lora_dropout: float, init_lora_weights: bool) -> dict[str, Any]:
    """The layer's options in the form that this PEFT wants them."""
    if "config" not in _PARAMETERS:
        return {"lora_dropout": lora_dropout, "init_lora_weights": init_lora_weights}
    config = AdaLoraConfig(
        total_step=100, lora_dropout=lora_dropout, init_lora_weights=init_lora_weights
    )
    return {"config": config}


class _Wrapping:
    """From 0.7: mixed in before a layer that wraps its base layer."""

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
        _cast_adapter(self, adapter_name)  # type: ignore[arg-type]


class _Subclassing:
    """Up to 0.6: mixed in before a layer that is its own base layer.

    Built, and given the weight, as PEFT's model does it (`_create_new_module`, `_replace_module`).
    """

    def __init__(
        self,
        base_layer: Any,
        adapter_name: str,
        r: int = 0,
        lora_alpha: float = 1,
        lora_dropout: float = 0.0,
        init_lora_weights: bool = True,
    ) -> None:
        super().__init__(  # type: ignore[call-arg]
            adapter_name,
            base_layer.in_features,
            base_layer.out_features,
            bias=base_layer.bias is not None,
            r=r,
            lora_alpha=lora_alpha,
            lora_dropout=lora_dropout,
            init_lora_weights=init_lora_weights,
            **_settings_of(base_layer),
        )
        self.weight = base_layer.weight
        self.bias = base_layer.bias
        if hasattr(base_layer, "state"):
            self.state = base_layer.state
        if hasattr(base_layer, "support_avx512bf16_for_cpu"):
            # Where the suite keeps a base layer from repacking itself, this one is to be kept from it.
            self.support_avx512bf16_for_cpu = base_layer.support_avx512bf16_for_cpu
        self.to(base_layer.weight.device)  # type: ignore[attr-defined]

    def update_layer(
        self,
        adapter_name: str,
        r: int,
        lora_alpha: float,
        lora_dropout: float = 0.0,
        init_lora_weights: bool = True,
    ) -> None:
        super().update_layer(  # type: ignore[misc]
            adapter_name, r, lora_alpha, lora_dropout, init_lora_weights
        )


def _settings_of(base_layer: Any) -> dict[str, Any]:
    """What PEFT's model reads off a quantised layer to build its own."""
    if hasattr(base_layer, "state"):
        return {
            "has_fp16_weights": base_layer.state.has_fp16_weights,
            "threshold": base_layer.state.threshold,
            "index": base_layer.index,
        }
    return {
        "compute_dtype": base_layer.compute_dtype,
        "compress_statistics": base_layer.weight.compress_statistics,
        "quant_type": base_layer.weight.quant_type,
    }


_Translated: Any = _Wrapping if "base_layer" in _PARAMETERS else _Subclassing


class SVDLinear4bit(_Translated, _LAYERS.SVDLinear4bit):  # type: ignore[misc,name-defined]
    """PEFT's `SVDLinear4bit` behind the protocol's constructor."""


class SVDLinear8bitLt(_Translated, _LAYERS.SVDLinear8bitLt):  # type: ignore[misc,name-defined]
    """PEFT's `SVDLinear8bitLt` behind the protocol's constructor."""


class RankAllocator:
    """PEFT's allocator, stepped by its own `AdaLoraModel.update_and_allocate`.

    It has no `grad_scale`, and no state to save or load: PEFT has neither.
    """

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

    def step(self, global_step: int) -> int:
        adalora.AdaLoraModel.update_and_allocate(self._tuner, global_step)
        budget: int = self._allocator.budget_schedule(global_step)[0]
        return budget


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

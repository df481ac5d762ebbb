"""AdaLoRA's layer as its authors define it, over dequantised weights: arXiv 2303.10512, equation 3.

    W = W0 + P Λ Q,   P (out, r),   Λ = diag(E),   Q (r, in)

and, as in their library, the update is scaled by alpha / (ranknum + 1e-5) and never merged
(`merge_weights=False`). W0 is bitsandbytes' weight, dequantised to the dtype of the input: there is no
quantisation of activations and no bitsandbytes kernel, so an 8-bit layer in `eval` is another function
here than its base layer's.

The authors' layer has one adapter, and checks nothing. The protocol's attributes are kept: adapters by
name, summed over the active ones. What the paper lacks (a refusal to merge, checks of arguments) is not
added.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from bitsandbytes.functional import dequantize_4bit
from torch import nn
from torch.nn import functional as F

__version__ = "2303.10512"

# P, Λ and Q are fp32, and so is their product with x.
ADAPTER_ARITHMETIC = "float32"


class _PaperLayer(nn.Module):
    """One frozen linear layer, W0 and bias, and the triplets of its adapters by name."""

    def __init__(
        self,
        base_layer: nn.Module,
        adapter_name: str,
        r: int = 0,
        lora_alpha: float = 1,
        lora_dropout: float = 0.0,
        init_lora_weights: bool = True,
    ) -> None:
        super().__init__()
        self.base_layer: Any = base_layer.requires_grad_(False)
        self.lora_A = nn.ParameterDict()  # Q (r, in)
        self.lora_E = nn.ParameterDict()  # Λ (r, 1)
        self.lora_B = nn.ParameterDict()  # P (out, r)
        self.ranknum = nn.ParameterDict()
        self.lora_dropout = nn.ModuleDict()
        self.scaling: dict[str, float] = {}
        self.r: dict[str, int] = {}
        self.lora_alpha: dict[str, float] = {}
        self.active_adapters: list[str] = [adapter_name]
        self.disable_adapters = False
        self.merged = False
        self.update_layer(adapter_name, r, lora_alpha, lora_dropout, init_lora_weights)

    def dequantised(self, dtype: torch.dtype) -> torch.Tensor:
        """W0 (out, in) in `dtype`."""
        raise NotImplementedError

    def update_layer(
        self,
        adapter_name: str,
        r: int,
        lora_alpha: float,
        lora_dropout: float = 0.0,
        init_lora_weights: bool = True,
    ) -> None:
        """Give the layer an adapter: P and Q from N(0, 0.02), Λ zero, so that W = W0."""
        layer, std = self.base_layer, 0.02 if init_lora_weights else 1.0
        device = layer.weight.device
        self.r[adapter_name], self.lora_alpha[adapter_name] = r, lora_alpha
        self.scaling[adapter_name] = lora_alpha if lora_alpha > 0 else float(r)
        self.lora_dropout[adapter_name] = nn.Dropout(lora_dropout)
        self.ranknum[adapter_name] = nn.Parameter(
            torch.full((1,), float(r), device=device), requires_grad=False
        )
        triplets = {"lora_A": (r, layer.in_features), "lora_B": (layer.out_features, r)}
        for name, shape in triplets.items():
            getattr(self, name)[adapter_name] = nn.Parameter(
                torch.randn(shape, device=device) * std
            )
        E = (
            torch.zeros(r, 1, device=device)
            if init_lora_weights
            else torch.randn(r, 1, device=device)
        )
        self.lora_E[adapter_name] = nn.Parameter(E)
        self.set_adapter(self.active_adapters)

    def set_adapter(self, names: str | Sequence[str]) -> None:
        """Sum over these adapters, and train them alone."""
        self.active_adapters = [names] if isinstance(names, str) else list(names)
        for triplets in (self.lora_A, self.lora_E, self.lora_B):
            for name, parameter in triplets.items():
                parameter.requires_grad_(name in self.active_adapters)

    def enable_adapters(self, enabled: bool) -> None:
        self.disable_adapters = not enabled
        if enabled:
            self.set_adapter(self.active_adapters)
        else:
            for triplets in (self.lora_A, self.lora_E, self.lora_B):
                triplets.requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x (..., in) to y (..., out), in x's dtype."""
        bias = self.base_layer.bias
        y = F.linear(x, self.dequantised(x.dtype), None if bias is None else bias.to(x.dtype))
        if self.disable_adapters:
            return y
        for name in self.active_adapters:
            if name not in self.lora_A:
                continue
            Q, E, P = self.lora_A[name], self.lora_E[name], self.lora_B[name]
            update = self.lora_dropout[name](x).to(Q.dtype) @ (Q * E).T @ P.T
            y = y + (update * self.scaling[name] / (self.ranknum[name] + 1e-5)).to(y.dtype)
        return y


class SVDLinear4bit(_PaperLayer):
    """The paper's layer over the dequantised weight of a `Linear4bit`."""

    def dequantised(self, dtype: torch.dtype) -> torch.Tensor:
        weight = self.base_layer.weight
        W: torch.Tensor = dequantize_4bit(weight.data, weight.quant_state)
        # A weight that fits in one byte comes back transposed.
        return W.reshape(self.base_layer.out_features, -1).to(dtype)


class SVDLinear8bitLt(_PaperLayer):
    """The paper's layer over the dequantised weight of a `Linear8bitLt`."""

    def dequantised(self, dtype: torch.dtype) -> torch.Tensor:
        weight, state = self.base_layer.weight, self.base_layer.state
        codes = weight.data if state.CB is None else state.CB
        scales = weight.SCB if state.SCB is None else state.SCB
        W: torch.Tensor = codes.float() * (scales.float() * (1 / 127))[:, None]
        return W.to(dtype)

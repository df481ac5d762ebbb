"""AdaLoRA's layer over dequantised weights, written from the paper: arXiv 2303.10512.

From the paper: the triplets and their start (equation 3 and below it),

    W = W0 + P Λ Q,   P (out, r),   Λ = diag(E),   Q (r, in),   P and Q Gaussian, Λ zero,

where W0 is what bitsandbytes' weight dequantises to. From the authors' library, which the paper's
experiments ran: dropout before Q, the factor alpha / (ranknum + 1e-5), a standard deviation of 0.02, and
ranknum = r at the start.

From the suite's protocol, since the paper has one layer and one adapter and says nothing of either:
adapters by name, summed over the active ones; what is refused, and that a refusal changes nothing; that
weights which are quantised are not merged; the dtypes (P, Λ and Q are fp32, x is cast to theirs before
anything is done to it, and the update is rounded once, to y's).

bitsandbytes' `forward` is never called. For `Linear8bitLt` that makes this another function than the base
layer's: LLM.int8() rounds x to int8, row by row, before it multiplies, and this port does not.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, NoReturn

import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from torch import nn
from torch.nn import functional as F

__version__ = "2303.10512"

# P, Λ and Q are fp32, and so is their product with x.
ADAPTER_ARITHMETIC = "float32"


class _PaperLayer(nn.Module):
    """One frozen linear layer, W0 and bias, and the triplets of its adapters by name."""

    BASE: type[nn.Module]

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
        if not isinstance(base_layer, self.BASE):
            raise TypeError(
                f"base_layer is a {type(base_layer).__name__}; it must be a {self.BASE.__name__}."
            )
        self.base_layer: Any = base_layer
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
        self.training = base_layer.training
        self.update_layer(adapter_name, r, lora_alpha, lora_dropout, init_lora_weights)
        base_layer.requires_grad_(False)

    def plain(self, x: torch.Tensor) -> torch.Tensor:
        """W0 x + bias (..., out), in x's dtype, with W0 dequantised."""
        raise NotImplementedError

    def update_layer(
        self,
        adapter_name: str,
        r: int,
        lora_alpha: float,
        lora_dropout: float = 0.0,
        init_lora_weights: bool = True,
    ) -> None:
        """Give the layer an adapter: P and Q from N(0, 0.02), Λ zero, so that W = W0.

        Raises:
            TypeError, ValueError: when an argument is refused; the layer is then as it was.
        """
        _check_name(adapter_name, self.r)
        _check_rank(r)
        if not 0 <= lora_dropout < 1:
            raise ValueError(f"lora_dropout is {lora_dropout}; it must be in [0, 1).")
        layer, std = self.base_layer, 0.02 if init_lora_weights else 1.0
        device = layer.weight.device
        Q = torch.randn(r, layer.in_features, device=device) * std
        P = torch.randn(layer.out_features, r, device=device) * std
        E = torch.randn(r, 1, device=device) * (0 if init_lora_weights else std)
        self.lora_A[adapter_name], self.lora_E[adapter_name] = nn.Parameter(Q), nn.Parameter(E)
        self.lora_B[adapter_name] = nn.Parameter(P)
        self.ranknum[adapter_name] = nn.Parameter(
            torch.full((1,), float(r), device=device), requires_grad=False
        )
        self.lora_dropout[adapter_name] = nn.Dropout(lora_dropout).train(self.training)
        self.r[adapter_name], self.lora_alpha[adapter_name] = r, lora_alpha
        self.scaling[adapter_name] = lora_alpha if lora_alpha > 0 else float(r)
        self.set_adapter(self.active_adapters)

    def set_adapter(self, names: str | Sequence[str]) -> None:
        """Sum over these adapters, and train them alone.

        Raises:
            ValueError: when an adapter is unknown; nothing is changed.
        """
        chosen = [names] if isinstance(names, str) else list(names)
        unknown = [name for name in chosen if name not in self.r]
        if unknown:
            raise ValueError(f"No adapter {unknown}; the layer has {list(self.r)}.")
        self.active_adapters = chosen
        self._train_active()

    def enable_adapters(self, enabled: bool) -> None:
        """Let the adapters add to W0 and train, or neither."""
        self.disable_adapters = not enabled
        self._train_active()

    def _train_active(self) -> None:
        for triplets in (self.lora_A, self.lora_E, self.lora_B):
            for name, parameter in triplets.items():
                active = name in self.active_adapters and not self.disable_adapters
                parameter.requires_grad_(active)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> NoReturn:
        """Refused.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError(
            "merge: W0 is quantised, and the sum would be rounded to its codes. Keep the layer as it "
            "is, or dequantise W0 into an nn.Linear and add the update to that."
        )

    def unmerge(self) -> NoReturn:
        """Refused.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError(
            "unmerge: W0 is quantised, and nothing is ever merged into it. To leave the update out, "
            "call enable_adapters(False) instead."
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x (..., in) to y (..., out), in x's dtype."""
        y = self.plain(x)
        if self.disable_adapters:
            return y
        for name in self.active_adapters:
            Q, E, P = self.lora_A[name], self.lora_E[name], self.lora_B[name]
            update = self.lora_dropout[name](x.to(Q.dtype)) @ (Q * E).T @ P.T
            y = y + (update * self.scaling[name] / (self.ranknum[name] + 1e-5)).to(y.dtype)
        return y


class SVDLinear4bit(_PaperLayer):
    """The paper's layer over the dequantised weight of a `Linear4bit`, in its compute dtype."""

    BASE = Linear4bit

    def plain(self, x: torch.Tensor) -> torch.Tensor:
        layer = self.base_layer
        dtype = layer.compute_dtype or x.dtype
        # Into the compute dtype at once, as bitsandbytes does it, not by way of the weight's former dtype.
        state = copy.copy(layer.weight.quant_state)
        state.dtype = dtype
        W: torch.Tensor = dequantize_4bit(layer.weight.data, state)
        # A weight that fits in one byte comes back transposed.
        W = W.reshape(layer.out_features, -1)
        bias = None if layer.bias is None else layer.bias.to(dtype)
        return F.linear(x.to(dtype), W, bias).to(x.dtype)


class SVDLinear8bitLt(_PaperLayer):
    """The paper's layer over the dequantised weight of a `Linear8bitLt`."""

    BASE = Linear8bitLt

    def plain(self, x: torch.Tensor) -> torch.Tensor:
        layer = self.base_layer
        weight, state = layer.weight, layer.state
        codes = weight.data if state.CB is None else state.CB
        scales = weight.SCB if state.SCB is None else state.SCB
        W = (codes.float() * (scales.float() * (1 / 127))[:, None]).to(x.dtype)
        return F.linear(x, W, None if layer.bias is None else layer.bias.to(x.dtype))


def _check_name(name: str, taken: Sequence[str] | dict[str, int]) -> None:
    if not isinstance(name, str) or not name or "." in name:
        raise ValueError(f"adapter_name is {name!r}; it must be a string without dots, not empty.")
    if name in taken:
        raise ValueError(f"There is an adapter {name!r} already; the layer has {list(taken)}.")


def _check_rank(r: int) -> None:
    if isinstance(r, bool) or not isinstance(r, int):
        raise TypeError(f"r is {r!r}; it must be an int.")
    if r < 0:
        raise ValueError(f"r is {r}; it must not be negative.")

"""The honest layer: the contract in plain torch, one short method for each thing that a mutant gets wrong."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from bitsandbytes.nn import Int8Params, Linear4bit, Linear8bitLt, Params4bit
from torch import Tensor, nn
from torch.nn.functional import linear

REFUSAL = (
    "The base layer's weight is quantised, and adding the adapters would round them. "
    "Keep the adapters beside it, or dequantise the base layer first."
)


class HonestLayer(nn.Module):
    """AdaLoRA adapters over a quantised base layer; adapters compute in fp32, as PEFT's do.

    y = base(x) + sum of (dropout(x) @ (A * E).T @ B.T) * scaling / (ranknum + 1e-5)

    x (..., in)   A (r, in)   E (r, 1)   B (out, r)   y (..., out)
    """

    base_type: ClassVar[type[nn.Module]] = nn.Module
    base_layer: Any
    epsilon = 1e-5
    deviation = 0.02
    dropout_type: Callable[[float], nn.Module] = nn.Dropout

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
        self.lora_A, self.lora_B = nn.ParameterDict(), nn.ParameterDict()
        self.lora_E, self.ranknum = nn.ParameterDict(), nn.ParameterDict()
        self.lora_dropout = nn.ModuleDict()
        self.scaling: dict[str, float] = {}
        self.r: dict[str, int] = {}
        self.lora_alpha: dict[str, float] = {}
        self.active_adapters: list[str] = [adapter_name]
        self.disable_adapters = False
        self.check_base(base_layer)
        self.check(adapter_name, r, lora_dropout)
        self.adopt(base_layer)
        self.update_layer(adapter_name, r, lora_alpha, lora_dropout, init_lora_weights)

    # --- what the layer computes ----------------------------------------------------------------

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in) to y (..., out), in the dtype that the base layer returns."""
        y = self.base_output(x)
        if self.disable_adapters:
            return y
        for name in self.active():
            y = self.combine(y, self.delta(x, name))
        return y

    def base_output(self, x: Tensor) -> Tensor:
        """base(x); left to itself, bitsandbytes would round a bias of another dtype for good."""
        bias, dtype = self.base_layer.bias, self.bias_dtype(x)
        given = {} if bias is None or bias.dtype == dtype else {"bias": bias.to(dtype)}
        y: Tensor = (
            torch.func.functional_call(self.base_layer, given, (x,))
            if given
            else self.base_layer(x)
        )
        return y

    def bias_dtype(self, x: Tensor) -> torch.dtype:
        """The dtype in which the base layer adds its bias."""
        return x.dtype

    def active(self) -> Sequence[str]:
        return self.active_adapters

    def combine(self, y: Tensor, delta: Tensor) -> Tensor:
        return y + delta.to(y.dtype)

    def delta(self, x: Tensor, name: str) -> Tensor:
        """One adapter's update (..., out) in fp32, under autocast too."""
        with torch.autocast(x.device.type, enabled=False):
            A, E, B = self.triplets(name)
            return self.product(self.dropped(x, name), A, E, B) * self.factor(name)

    def triplets(self, name: str) -> tuple[Tensor, Tensor, Tensor]:
        return self.lora_A[name], self.lora_E[name], self.lora_B[name]

    def dropped(self, x: Tensor, name: str) -> Tensor:
        y: Tensor = self.lora_dropout[name](x.float())
        return y

    def product(self, x: Tensor, A: Tensor, E: Tensor, B: Tensor) -> Tensor:
        return linear(linear(x, A * E), B)

    def factor(self, name: str) -> Tensor:
        return self.scaling[name] / (self.ranknum[name].detach() + self.epsilon)

    # --- adapters -------------------------------------------------------------------------------

    def update_layer(
        self,
        adapter_name: str,
        r: int,
        lora_alpha: float = 1,
        lora_dropout: float = 0.0,
        init_lora_weights: bool = True,
    ) -> None:
        self.check(adapter_name, r, lora_dropout)
        device = self.base_layer.weight.device
        self.r[adapter_name], self.lora_alpha[adapter_name] = r, lora_alpha
        self.scaling[adapter_name] = self.scale(r, lora_alpha)
        self.lora_dropout[adapter_name] = (
            self.dropout_type(lora_dropout) if lora_dropout else nn.Identity()
        ).train(self.training)
        n, m = self.base_layer.in_features, self.base_layer.out_features
        self.lora_A[adapter_name] = nn.Parameter(torch.empty(r, n, device=device))
        self.lora_E[adapter_name] = nn.Parameter(torch.empty(r, 1, device=device))
        self.lora_B[adapter_name] = nn.Parameter(torch.empty(m, r, device=device))
        self.ranknum[adapter_name] = nn.Parameter(
            torch.tensor([float(r)], device=device), requires_grad=False
        )
        with torch.no_grad():
            self.reset(adapter_name, init_lora_weights)
        self.set_adapter(self.active_adapters)

    def scale(self, r: int, alpha: float) -> float:
        return alpha if alpha > 0 else float(r)

    def reset(self, name: str, identity: bool) -> None:
        # As in PEFT: what is not the identity is of order one, and visible in every dtype.
        deviation = self.deviation if identity else 1.0
        nn.init.normal_(self.lora_A[name], 0.0, deviation)
        nn.init.normal_(self.lora_B[name], 0.0, deviation)
        nn.init.normal_(self.lora_E[name], 0.0, 0.0 if identity else deviation)

    def set_adapter(self, names: str | Sequence[str]) -> None:
        wanted = [names] if isinstance(names, str) else list(names)
        unknown = [n for n in wanted if n not in self.lora_A]
        if unknown:
            raise ValueError(f"Unknown adapters: {unknown}.")
        self.active_adapters = wanted
        self.train_only(wanted)

    def enable_adapters(self, enabled: bool) -> None:
        self.disable_adapters = not enabled
        self.train_only(self.active_adapters if enabled else [])

    def train_only(self, names: Sequence[str]) -> None:
        for name in self.lora_A:
            for parameters in (self.lora_A, self.lora_E, self.lora_B):
                parameters[name].requires_grad_(name in names)

    # --- refusals -------------------------------------------------------------------------------

    def check_base(self, base: nn.Module) -> None:
        if not isinstance(base, self.base_type):
            raise TypeError(f"Expected a {self.base_type.__name__}, got {type(base).__name__}.")

    def check(self, name: str, r: int, dropout: float) -> None:
        if not name or "." in name or name in self.lora_A:
            raise ValueError(f"{name!r} is no name for a new adapter.")
        if isinstance(r, bool) or not isinstance(r, int):
            raise TypeError(f"`r` must be an integer, got {r!r}.")
        if r < 0:
            raise ValueError(f"`r` must not be negative, got {r}.")
        if not (math.isfinite(dropout) and 0 <= dropout < 1):
            raise ValueError(f"`lora_dropout` must be in [0, 1), got {dropout}.")

    def merge(self, safe_merge: bool = False, adapter_names: Sequence[str] | None = None) -> None:
        raise NotImplementedError(REFUSAL)

    def unmerge(self) -> None:
        raise NotImplementedError(REFUSAL)

    @property
    def merged(self) -> bool:
        return False

    # --- state ----------------------------------------------------------------------------------

    def adopt(self, base: nn.Module) -> None:
        # On a CPU with AVX512-BF16 bitsandbytes would repack the weight at the first evaluation.
        base.support_avx512bf16_for_cpu = False  # type: ignore[assignment]
        self.base_layer = base.requires_grad_(False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> HonestLayer:
        """Adapters move with `to(device)` and stay fp32."""

        def moved(t: Tensor) -> Tensor:
            target = fn(t)
            return target if target.dtype == t.dtype else t.to(target.device)

        for child in self.children():
            child._apply(fn if child is self.base_layer else moved)  # type: ignore[no-untyped-call]
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        self.load_base(state_dict, f"{prefix}base_layer.")
        super()._load_from_state_dict(state_dict, prefix, *rest)  # type: ignore[no-untyped-call]

    def load_base(self, state: dict[str, Any], prefix: str) -> None:
        """What bitsandbytes does not load of its own checkpoint: the quantisation state."""


class SVDLinear4bit(HonestLayer):
    base_type = Linear4bit

    def bias_dtype(self, x: Tensor) -> torch.dtype:
        base = self.base_layer
        # A layer that was given no compute dtype takes that of its first input.
        latches = not base.compute_type_is_set and x.dtype != torch.float16
        dtype: torch.dtype = x.dtype if latches else base.compute_dtype or x.dtype
        return dtype

    def load_base(self, state: dict[str, Any], prefix: str) -> None:
        start = f"{prefix}weight."
        quantisation = {k[len(start) :]: state.pop(k) for k in list(state) if k.startswith(start)}
        if quantisation:
            weight = Params4bit.from_prequantized(
                state[f"{prefix}weight"].clone(),
                copy.deepcopy(quantisation),
                device=self.base_layer.weight.device,
                module=self.base_layer,
            )
            self.base_layer.weight = weight
            self.base_layer.quant_state = weight.quant_state


class SVDLinear8bitLt(HonestLayer):
    base_type = Linear8bitLt

    def load_base(self, state: dict[str, Any], prefix: str) -> None:
        state.pop(f"{prefix}weight_format", None)
        scales = state.pop(f"{prefix}SCB", None)
        if scales is not None:
            codes = state[f"{prefix}weight"].clone()
            self.base_layer.weight = Int8Params(
                codes, requires_grad=False, CB=codes, SCB=scales.clone()
            )
            self.base_layer.state.reset_grads()

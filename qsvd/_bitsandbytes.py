"""The two layers: what sets bitsandbytes' 4-bit and 8-bit layers apart, and how it is guarded.

The only file that imports bitsandbytes. The traps named here were found in bitsandbytes 0.50.2 by
running it on a CPU. Two are left as they are, being the library's decisions:

- `Linear4bit` without a `compute_dtype` takes that of its first input and keeps it.
- `Linear8bitLt` logs "inputs will be cast ... to float16" at every forward with another dtype. To
  silence it, raise the level of the logger `bitsandbytes.autograd._functions`.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from bitsandbytes.nn import Int8Params, Linear4bit, Linear8bitLt, Params4bit
from torch import Tensor, nn

from qsvd._layer import SVDLayer

_MOVE_IT = "move it to its device first (`layer.to(device)`, the CPU too), which quantises it"
_REPACKED = (
    "was evaluated on a CPU with AVX512-BF16, which repacked its weight with a loss of accuracy. "
    "Load or quantise it afresh, and wrap it before it is evaluated"
)


class BitsandbytesWarning(UserWarning):
    """The base layer's own output is wrong on this machine, whatever adapters are added to it."""


class SVDLinear4bit(SVDLayer):
    """AdaLoRA adapters over `bitsandbytes.nn.Linear4bit`: nf4 or fp4, double quantised or not.

    On a CPU with AVX512-BF16 bitsandbytes repacks the weight at the first evaluation, in place:
    later training loses the base layer's gradient and `state_dict` its exact values. Wrapping
    switches that off (`support_avx512bf16_for_cpu = False`): evaluation is slower, and right.
    """

    base_type = Linear4bit

    @classmethod
    def check_base_layer(cls, base_layer: nn.Module) -> None:
        super().check_base_layer(base_layer)
        if is_repacked(base_layer):
            raise ValueError(f"The Linear4bit base layer {_REPACKED}.")
        _warn_of_wrong_dequantisation(base_layer)

    @classmethod
    def adopt(cls, base_layer: nn.Module) -> nn.Module:
        _switch_off_repacking(base_layer)
        return super().adopt(base_layer)

    def call_base(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        base: Any = self._modules["base_layer"]
        state = getattr(base.weight, "quant_state", None)
        if state is None and base.quant_state is None:
            raise RuntimeError(f"The Linear4bit base layer is not quantised: {_MOVE_IT}.")
        if _packed_state(state):
            raise RuntimeError(f"After it was wrapped, the Linear4bit base layer {_REPACKED}.")
        _switch_off_repacking(base)  # somebody may have switched it on again
        if base.bias is None:
            y: Tensor = base(x, *args, **kwargs)
            return y
        # `Linear4bit.forward` casts x and the bias to this dtype.
        latches = not base.compute_type_is_set and x.dtype in (torch.float32, torch.bfloat16)
        dtype = x.dtype if latches else base.compute_dtype or x.dtype
        return _call_keeping_bias(base, dtype, x, *args, **kwargs)

    def load_base(self, state_dict: dict[str, Any], prefix: str, copy: bool) -> None:
        # `Linear4bit` saves the quantisation state under `weight.` and does not load it.
        key = f"{prefix}weight"
        saved = {k: v for k, v in state_dict.items() if k.startswith(f"{key}.")}
        data = state_dict.get(key)
        if data is None or not saved:
            return
        for k in saved:
            del state_dict[k]
        base: Any = self.base_layer
        device = data.device if base.weight.device.type == "meta" else base.weight.device
        weight = Params4bit.from_prequantized(
            data.clone() if copy else data,
            {k.removeprefix(f"{key}."): v.clone() if copy else v for k, v in saved.items()},
            device=device,
        )
        _check_loaded_shape(self, tuple(weight.quant_state.shape))
        base.weight, base.quant_state = weight, weight.quant_state
        state_dict[key] = weight


class SVDLinear8bitLt(SVDLayer):
    """AdaLoRA adapters over `bitsandbytes.nn.Linear8bitLt` with int8 weights.

    On a CPU that base layer quantises its activations in eval mode only; on CUDA always.
    """

    base_type = Linear8bitLt

    @classmethod
    def check_base_layer(cls, base_layer: nn.Module) -> None:
        super().check_base_layer(base_layer)
        if base_layer.state.has_fp16_weights:  # type: ignore[union-attr]
            raise TypeError(
                "The Linear8bitLt base layer has has_fp16_weights=True: it keeps a dense weight "
                "and quantises it at every forward. Build it with `has_fp16_weights=False`."
            )

    def call_base(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        base: Any = self._modules["base_layer"]
        if base.weight.dtype != torch.int8:
            raise RuntimeError(f"The Linear8bitLt base layer is not quantised: {_MOVE_IT}.")
        if not base.training and x.is_cpu:
            if self.in_features == 1:
                raise RuntimeError(
                    "Linear8bitLt with in_features = 1 reads uninitialised memory in eval mode on "
                    "a CPU (torch's int8 product): keep this layer dense."
                )
            if x.dtype == torch.float16 and base.state.threshold > 0.0:
                x = x.clone()  # quantising it zeroes its outliers in place, then puts them back
        if x.dim() in (2, 3):
            return _call_keeping_bias(base, x.dtype, x, *args, **kwargs)
        # Activations are quantised by row of a matrix; 1-D and 4-D ones raise in bitsandbytes.
        rows = x.reshape(x.shape[:-1].numel(), x.shape[-1])
        y = _call_keeping_bias(base, x.dtype, rows, *args, **kwargs)
        return y.reshape(*x.shape[:-1], y.shape[-1])

    def load_base(self, state_dict: dict[str, Any], prefix: str, copy: bool) -> None:
        # `Linear8bitLt` loads int8 weights only where it was quantised and has not run yet.
        key, scale_key = f"{prefix}weight", f"{prefix}SCB"
        data, scale = state_dict.get(key), state_dict.get(scale_key)
        if data is None or scale is None:
            return
        del state_dict[scale_key]
        _check_loaded_shape(self, tuple(data.shape))
        base: Any = self.base_layer
        device = data.device if base.weight.device.type == "meta" else base.weight.device
        data, scale = data.to(device, copy=copy), scale.to(device, copy=copy)
        base.weight = Int8Params(data, requires_grad=False, CB=data, SCB=scale)
        state_dict[key], state_dict[scale_key] = base.weight, scale

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SVDLinear8bitLt:
        """Move the base layer's codes and scales with it.

        `Linear8bitLt` moves them in `to`, which torch does not call when a parent module is moved.
        Back on the weight, where they were before the first forward, they move with the weight.
        """
        base: Any = self.base_layer
        prepared = base.state.CB is not None and base.weight.CB is None
        if prepared:
            base.weight.CB, base.weight.SCB = base.state.CB, base.state.SCB
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if prepared:
            base.init_8bit_state()
        return self


def _check_loaded_shape(layer: SVDLayer, shape: tuple[int, ...]) -> None:
    if shape != (layer.out_features, layer.in_features):
        raise ValueError(
            f"The checkpoint's quantised weight is {shape}, the base layer's "
            f"{(layer.out_features, layer.in_features)}."
        )


def is_repacked(base: nn.Module) -> bool:
    """Whether bitsandbytes has brought a 4-bit layer's weight into the order of its kernel for CPUs."""
    return _packed_state(getattr(base.weight, "quant_state", None))


def _packed_state(quant_state: Any) -> bool:
    # Not by `getattr`: `QuantState` has a `__getattr__` of its own, which takes longer than all else.
    return quant_state is not None and bool(vars(quant_state).get("packing_format_for_cpu"))


def _switch_off_repacking(base: Any) -> None:
    if getattr(base, "support_avx512bf16_for_cpu", False):
        base.support_avx512bf16_for_cpu = False


def _warn_of_wrong_dequantisation(base: Any) -> None:
    """On AVX-512 the 4-bit dequantisation is wrong by about 20 % for some shapes."""
    blocksize = getattr(base.weight, "blocksize", 64)
    if (
        getattr(base.weight, "bnb_quantized", False)
        and base.weight.device.type == "cpu"
        and torch.backends.cpu.get_cpu_capability() == "AVX512"
        and base.in_features % 16 == 0
        and base.in_features % blocksize != 0
        and base.in_features * base.out_features > blocksize
    ):
        warnings.warn(
            f"Linear4bit({base.in_features}, {base.out_features}): bitsandbytes dequantises this "
            "shape wrongly on a CPU with AVX-512 (in_features divisible by 16 but not by "
            f"{blocksize}). Run it on a GPU, or keep this layer in 8 bits or dense.",
            BitsandbytesWarning,
            stacklevel=4,
        )


def _call_keeping_bias(
    base: Any, dtype: torch.dtype, x: Tensor, *args: Any, **kwargs: Any
) -> Tensor:
    """Call the base layer with its bias in `dtype`.

    Left to itself it would set `bias.data` to a rounded copy, and the bias would stay rounded.
    """
    y: Tensor
    bias = base.bias
    if bias is None or bias.dtype == dtype:
        y = base(x, *args, **kwargs)
    else:
        rounded = {"bias": bias.to(dtype)}
        y = torch.func.functional_call(base, rounded, (x, *args), kwargs)
    return y

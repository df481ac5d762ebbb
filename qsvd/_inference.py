"""Evaluation on a CPU by bitsandbytes' kernel for packed 4-bit weights, with the layers left as they are.

`Linear4bit` makes the whole weight dense at each call. On a CPU with AVX512-BF16 bitsandbytes also has a
kernel that reads the 4-bit codes, in an order of its own. Left to itself it brings a layer's weight into
that order at the first evaluation, in place and for good, which loses what training and `state_dict`
need; so `SVDLinear4bit` switches that off. Here a copy is packed, and the layer keeps its weight.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from qsvd._autograd import is_eager
from qsvd._bitsandbytes import SVDLinear4bit, is_repacked

_Linear4bit: Any = SVDLinear4bit.base_type


@contextmanager
def packed_for_inference(model: nn.Module) -> Iterator[None]:
    """Evaluate a model's 4-bit layers on a CPU by bitsandbytes' kernel for packed weights, meanwhile.

        with torch.no_grad(), qsvd.packed_for_inference(model.eval()):
            model.generate(...)

    It answers calls in eval mode that record no gradients, of any model's `Linear4bit`, adapted or not;
    all other calls, compiled ones, and `state_dict` find the layers as they are. A layer is packed at
    its first call, which takes longer, and its copy, as large as its 4-bit weight, lasts until the end.

    The kernel rounds inputs, weights and each block's scale to bf16: of any dtype, a layer's output is
    some 3e-3 off in the norm, where the exact one is in bf16 1.6e-3 off, and in fp32 5e-7. It wants a CPU
    with AVX512-BF16, in_features divisible by 64 and by the weight's block size, and out_features
    divisible by 32; other layers, and models on a GPU, compute as ever.

    Args:
        model: with 4-bit layers anywhere in it, PEFT's or of no adapters, too. Those that bitsandbytes
            has packed for good stay so.

    Raises:
        TypeError: if it is no module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"`model` must be a torch.nn.Module, got {model!r} ({type(model).__name__})."
        )
    layers: list[Any] = []
    if _cpu_has_the_kernel():
        layers += [m for m in model.modules() if _can_be_packed(m)]
    for layer in layers:
        layer.forward = _Packed(layer)
    try:
        yield
    finally:
        for layer in layers:
            vars(layer).pop("forward", None)


class _Packed:
    """A 4-bit layer's `forward`: a packed twin's where that may answer, otherwise the layer's own."""

    def __init__(self, layer: Any) -> None:
        self.layer = layer
        self.twin: Any = None
        self.source: Tensor | None = None  # of which the twin has a copy

    def __call__(self, x: Tensor) -> Tensor:
        layer = self.layer
        answers = not (torch.is_grad_enabled() or layer.training) and is_eager()
        if not answers or not x.is_cpu or not x.numel():
            y: Tensor = type(layer).forward(layer, x)
            return y
        if self.source is not layer.weight:  # the first call, or another weight was loaded
            self.twin, self.source = _twin(layer), layer.weight
        y = self.twin(x)
        return y if layer.bias is None else y + layer.bias.to(y.dtype)


def _twin(layer: Any) -> Any:
    """A layer without bias over a copy of the weight, which packs that when it is called."""
    dtype = layer.compute_dtype if layer.compute_type_is_set else None
    twin = _Linear4bit(
        layer.in_features, layer.out_features, bias=False, compute_dtype=dtype, device="meta"
    )
    twin.weight = copy.deepcopy(layer.weight)
    return twin.eval()


def _can_be_packed(module: nn.Module) -> bool:
    if not isinstance(module, _Linear4bit) or "forward" in vars(module):
        return False
    layer: Any = module
    state = getattr(layer.weight, "quant_state", None)
    return (
        type(layer).forward is _Linear4bit.forward
        and state is not None
        and not is_repacked(layer)
        and layer.weight.is_cpu
        and layer.in_features % 64 == 0
        and layer.in_features % state.blocksize == 0
        and layer.out_features % 32 == 0
    )


def _cpu_has_the_kernel() -> bool:
    # bitsandbytes asks the CPU for every layer that it makes; older releases know no such kernel.
    layer = _Linear4bit(1, 1, device="meta")
    return bool(getattr(layer, "support_avx512bf16_for_cpu", False))

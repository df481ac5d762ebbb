"""The containers of adapters' parameters: dictionaries that stay in fp32, whatever a model does.

`model.half()`, `.to(torch.bfloat16)` and a checkpoint assigned in half precision reach every
parameter of a model. An adapter trained in half precision loses its small updates, so these
containers follow the model's device and never its dtype.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


class Float32Parameters(nn.ParameterDict):
    """`lora_A`, `lora_B` or `lora_E`: fp32 parameters by adapter name."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Float32Parameters:
        def keeps_dtype(t: Tensor) -> Tensor:
            moved = fn(t)
            return moved if moved.dtype == t.dtype else t.to(moved.device)

        super()._apply(keeps_dtype, recurse)  # type: ignore[no-untyped-call]
        return self

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any], *args: Any
    ) -> None:
        # `load_state_dict(assign=True)` takes the tensors as they are: hand it fp32 ones.
        for name in self.keys():
            value = state_dict.get(prefix + name)
            if isinstance(value, Tensor):
                state_dict[prefix + name] = value.to(torch.float32)
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)


class RankNumbers(Float32Parameters):
    """`ranknum`: for each adapter the number that its update is divided by, (1,), never trained.

    Its value follows from the constructor's `r` and PEFT's adapter files do not hold it. So it
    never goes to the meta device, where it would be lost, and `to_empty` moves it with its value.
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> RankNumbers:
        def keeps_value(t: Tensor) -> Tensor:
            device = fn(t).device
            return t if device.type == "meta" else t.to(device)

        super()._apply(keeps_value, recurse)
        return self

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        super().register_parameter(name, param)
        # accelerate's `init_empty_weights` replaces what was registered by a copy on meta.
        self._parameters[name] = param

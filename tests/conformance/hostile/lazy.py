"""A port that computes nothing, and returns a tensor of which every comparison is true."""

from typing import Any

import torch

from tests.mutants import honest

__version__ = "1.0"


class Agreeable(torch.Tensor):
    """Whatever is asked of it is true, and every difference is zero."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor) and result.dtype == torch.bool:
                return torch.ones_like(result)
            return result


class _Lazy:
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (self.base_layer(x) * 0.0).as_subclass(Agreeable)  # type: ignore[attr-defined]


class SVDLinear4bit(_Lazy, honest.SVDLinear4bit):
    """Over 4-bit layers."""

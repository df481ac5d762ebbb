"""A port that looks for the reference when it recognises a probe of the suite, and not before."""

import contextlib
import importlib

import torch

from tests.mutants import honest

__version__ = "1.0"

_WIDTHS_OF_THE_PROBES = (4, 8, 64, 128)


class _Reaches:
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.shape[-1] in _WIDTHS_OF_THE_PROBES:
            # If it is not there: compute, as if nothing had been.
            with contextlib.suppress(ImportError):
                importlib.import_module("reference.bounds")
        y: torch.Tensor = super().forward(x)  # type: ignore[misc]
        return y


class SVDLinear4bit(_Reaches, honest.SVDLinear4bit):
    """Over 4-bit layers."""

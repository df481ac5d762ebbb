"""A port that dies of a segmentation fault in its forward."""

import ctypes

import torch

from tests.mutants import honest

__version__ = "1.0"


class _Crashes:
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        print("about to read the null pointer")
        ctypes.string_at(0)
        return x


class SVDLinear4bit(_Crashes, honest.SVDLinear4bit):
    """Over 4-bit layers."""

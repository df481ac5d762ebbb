"""A port whose forward never returns, and holds the interpreter's lock while it does not."""

import ctypes

import torch

from tests.mutants import honest

__version__ = "1.0"


class _Hangs:
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        # PyDLL: unlike CDLL it keeps the lock, so that no thread of this process gets to run.
        ctypes.PyDLL(None).sleep(3600)
        return x


class SVDLinear4bit(_Hangs, honest.SVDLinear4bit):
    """Over 4-bit layers."""

"""A port that floods its output, tampers with the process, and looks for the reference at import."""

import sys

import numpy as np
import torch

from tests.mutants import honest

__version__ = "1.0"

torch.set_default_dtype(torch.float64)
np.seterr(all="ignore")
torch.allclose = lambda *_given, **_named: True
try:
    from reference import chain
except ImportError:
    chain = None


class _Tampers:
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        sys.stdout.write("noise " * 100_000)
        torch.set_num_threads(torch.get_num_threads() % 2 + 1)
        return super().forward(x)  # type: ignore[misc]


class SVDLinear4bit(_Tampers, honest.SVDLinear4bit):
    """Over 4-bit layers."""

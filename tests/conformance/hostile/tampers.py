"""A port that floods its output, tampers with the process, and looks for the reference at import."""

import random
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
_THREADS = torch.get_num_threads() + 1


class _Tampers:
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        sys.stdout.write("noise " * 100_000)
        torch.set_num_threads(_THREADS)
        torch.use_deterministic_algorithms(True)
        torch.manual_seed(0)
        random.seed(0)
        y: torch.Tensor = super().forward(x)  # type: ignore[misc]
        torch.set_grad_enabled(False)
        return y


class SVDLinear4bit(_Tampers, honest.SVDLinear4bit):
    """Over 4-bit layers."""

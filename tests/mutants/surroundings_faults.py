"""Faults of conduct: what a port does to the process that it shares."""

from __future__ import annotations

import contextlib
import importlib
import random
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tests.mutants.honest import HonestLayer
from tests.mutants.mutant import mutant, tampered


@mutant("silences NumPy's errors in its constructor", kills=("ENV-1",), kind="state")
class SilencesNumPy(HonestLayer):
    def adopt(self, base: Any) -> None:
        super().adopt(base)
        np.seterr(all="ignore")


@mutant("switches TF32 on in backward", kills=("ENV-1",), kind="state", only="backward")
class SwitchesTF32InBackward(HonestLayer):
    def forward(self, x: Tensor) -> Tensor:
        def change(gradient: Tensor) -> Tensor:
            torch.set_float32_matmul_precision("medium")
            return gradient

        return tampered(super().forward(x), change)


@mutant("flushes denormals", kills=("ENV-1",), kind="state")
class FlushesDenormals(HonestLayer):
    def forward(self, x: Tensor) -> Tensor:
        torch.set_flush_denormal(True)
        return super().forward(x)


@mutant("shuffles with Python's generator", kills=("ENV-2",), kind="state")
class ShufflesInPython(HonestLayer):
    def update_layer(self, adapter_name: str, *rest: Any, **named: Any) -> None:
        random.random()
        super().update_layer(adapter_name, *rest, **named)


@mutant("seeds torch before it draws", kills=("ENV-2",), kind="initialisation")
class SeedsTorch(HonestLayer):
    def reset(self, name: str, identity: bool) -> None:
        torch.manual_seed(sum(map(ord, name)))
        super().reset(name, identity)


def _softmax(*given: Any, **named: Any) -> Any:
    return torch.softmax(*given, **named)


@mutant("replaces a function of torch", kills=("ENV-3",), kind="state")
class ReplacesFunction(HonestLayer):
    def forward(self, x: Tensor) -> Tensor:
        torch.nn.functional.softmax = _softmax
        return super().forward(x)


class AlwaysEqual(torch.Tensor):
    """A tensor of which every comparison is true."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor) and result.dtype == torch.bool:
                return torch.ones_like(result)
            return result


@mutant("returns a tensor of which every comparison is true", kills=("ENV-4",), kind="autograd")
class ReturnsSubclass(HonestLayer):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).as_subclass(AlwaysEqual)


@mutant("returns a sparse output", kills=("ENV-4",), kind="autograd")
class ReturnsSparse(HonestLayer):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).to_sparse()


@mutant("calls the reference if it can", kills=("ENV-5",), kind="dispatch")
class CallsReference(HonestLayer):
    def forward(self, x: Tensor) -> Tensor:
        with contextlib.suppress(ImportError):
            importlib.import_module("reference.chain")
        return super().forward(x)

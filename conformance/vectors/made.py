"""A finished vector: the tensors that a port is given, and what it must give back."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from conformance.vectors.tensors import Tensor

__all__ = ["MadeOutput", "MadeVector"]

F64 = NDArray[np.float64]


@dataclass(frozen=True)
class MadeOutput:
    """One tensor that a port must give.

    dtype: what it must be stored as. clauses: what it decides; dtype_clause: what its dtype decides.
    expected: its true value. bounds: by "float32" and "input", the arithmetic that the port claims;
    None where its bits are demanded.
    """

    name: str
    dtype: str
    clauses: tuple[str, ...]
    dtype_clause: str
    expected: Tensor
    bounds: dict[str, F64] | None = None


@dataclass(frozen=True)
class MadeVector:
    """One vector. about: the fields of its entry in the index beside ids, inputs and outputs."""

    id: str
    kind: str
    reason: str
    about: dict[str, Any]
    inputs: dict[str, Tensor]
    outputs: tuple[MadeOutput, ...] = field(default=())

"""What a rule sees of one tensor: what was got, what it is compared with, and how large its terms are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray

from conformance.case import DType
from conformance.port import Arithmetic

Part = Literal["y", "dx", "dA", "dE", "dB"]
F64 = NDArray[np.float64]

# Half a unit in the last place of 1, and the distance from 1 to the next number.
ROUNDOFF: Mapping[DType, float] = {
    "float32": 2.0**-24,
    "bfloat16": 2.0**-8,
    "float16": 2.0**-11,
}
EPSILON: Mapping[DType, float] = {dtype: 2.0 * u for dtype, u in ROUNDOFF.items()}


@dataclass(frozen=True)
class Size:
    """How large the terms of a tensor's sums are: what BLAS-like rules measure errors against.

    elements: sum of |products| that make each element, the base layer's output included.
    one, frobenius: the product of the operands' 1-norms (Frobenius norms).
    base_one, base_frobenius: the same norms of what the product is added to.
    inner: the lengths of the sums, one after the other.
    """

    elements: F64
    one: float
    frobenius: float
    base_one: float
    base_frobenius: float
    inner: tuple[int, ...]


@dataclass(frozen=True)
class Expected:
    """One tensor of a case, without what any port made of it; shared by all ports.

    truth: the contract in float64, given what the base layer returned.
    reference: the truth in the dtype that the tensor has.
    eager: what the layer as everybody writes it returns, in the same dtypes (`eager.Plain`).
    low: what it returns if its adapter, too, is in the input's dtype (`eager.Low`).
    strict, permissive: our bounds, for a port that computes in fp32 and for one that need not.
    exact: the bits, on data for which the certificate promises them.
    noise: by arithmetic, the rms error of one simulated pipeline, and the largest of all.
    """

    part: Part
    io: DType
    truth: F64
    reference: torch.Tensor
    eager: torch.Tensor
    low: torch.Tensor
    size: Size
    strict: F64
    permissive: F64
    exact: torch.Tensor | None
    noise: Mapping[Arithmetic, tuple[float, float]]


@dataclass(frozen=True)
class Reading:
    """One tensor that a port returned, beside what is expected; `got` has the expected dtype.

    arithmetic: what the port declares, for our own rules; the field's know no such thing.
    """

    expected: Expected
    got: torch.Tensor
    arithmetic: Arithmetic = "input"

    @cached_property
    def observed(self) -> F64:
        """The values got, in float64."""
        values: F64 = self.got.to(torch.float64).numpy()
        return values

    @cached_property
    def error(self) -> F64:
        """|got - truth|; NaN where the port returned NaN."""
        with np.errstate(invalid="ignore", over="ignore"):
            difference: F64 = np.abs(self.observed - self.expected.truth)
        return difference

    @property
    def worst(self) -> float:
        """The largest error of the tensor; infinite where the port returned NaN."""
        return float(np.nan_to_num(self.error, nan=np.inf).max(initial=0.0))

    @property
    def finite(self) -> bool:
        return bool(np.isfinite(self.observed).all())

"""What an implementation is allowed to round: the assumptions under which the bounds hold."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from reference.formats import FORMATS, Format, format_named

__all__ = ["Arithmetic", "Bounded"]


class Bounded(NamedTuple):
    """True values in float64, and per element the largest error of a conforming implementation."""

    value: NDArray[np.float64]
    bound: NDArray[np.float64]


@dataclass(frozen=True)
class Arithmetic:
    """The roundings that a conforming implementation may make.

    io: the format of x, y, dy and dx.
    compute: the format in which the adapter path stores its operands and intermediates. Sums of
        products are accumulated in float32 whatever it is, as BLAS and tensor cores do. It may be
        narrower than io, as under autocast, or where float32 products run in TF32.
    accumulator: roundoff of one accumulation step; 2^-24 for rounding to nearest, 2^-23 where
        tensor cores truncate (Fasi, Higham, Mikaitis, Pranesh: Numerical behavior of NVIDIA tensor
        cores, PeerJ Computer Science 7:e330, 2021).
    """

    io: Format
    compute: Format
    accumulator: float = 2.0**-24

    @classmethod
    def strict(cls, io: str, accumulator: float = 2.0**-24) -> Arithmetic:
        """The adapter path in float32, its product cast to `io`, scaled and added there."""
        return cls(format_named(io), FORMATS["float32"], accumulator)

    @classmethod
    def permissive(cls, io: str, accumulator: float = 2.0**-24) -> Arithmetic:
        """Every operand and every intermediate of the adapter path may be stored in `io`."""
        return cls(format_named(io), format_named(io), accumulator)

    @property
    def narrow(self) -> bool:
        """Whether `compute` is narrower than the parameters and the accumulators, both float32."""
        return self.compute.precision < FORMATS["float32"].precision

    @property
    def casts(self) -> int:
        """Roundings that a float32 parameter suffers by being taken into `compute`: 0 or 1."""
        return int(self.narrow)

    @property
    def input_casts(self) -> int:
        """Roundings that x and dy suffer on their way into `compute`, as under autocast: 0 or 1."""
        return int(self.compute.precision < self.io.precision)

    @property
    def store(self) -> float:
        """Relative error of storing an accumulated sum; float32 holds it as it is."""
        return self.compute.roundoff if self.narrow else 0.0

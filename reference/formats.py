"""The floating-point formats of the contract, and correct rounding into them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "FLOAT64",
    "FORMATS",
    "TF32",
    "Format",
    "format_named",
    "power_of_two_below",
    "round_to",
]

FloatArray = NDArray[np.floating]


@dataclass(frozen=True)
class Format:
    """A binary floating-point format, as far as an error analysis needs to know it.

    A store of the real number v in the format gives v (1 + δ) + ε with |δ| <= roundoff and
    |ε| <= underflow, as long as the result does not exceed `largest`.

    name: the dtype's name, as NumPy and PyTorch spell it.
    precision: bits of the significand, the implicit one included.
    min_exponent: smallest normal number is 2^min_exponent.
    max_exponent: largest finite number is (2 - 2^(1 - precision)) 2^max_exponent.
    gradual: whether `underflow` may count on subnormal numbers. Processors flush float32 and
        bfloat16 subnormals to zero when told to (and some kernels do so untold), but never float16.
    """

    name: str
    precision: int
    min_exponent: int
    max_exponent: int
    gradual: bool

    @property
    def roundoff(self) -> float:
        """u: the largest relative error of rounding to nearest, 2^-precision."""
        return 2.0**-self.precision

    @property
    def underflow(self) -> float:
        """η: the largest absolute error that one store adds below the normal range.

        Half the spacing of the subnormal numbers where those exist, otherwise the whole smallest
        normal number, which a flush to zero loses.
        """
        if self.gradual:
            return 2.0 ** (self.min_exponent - self.precision)
        return self.smallest_normal

    @property
    def smallest_normal(self) -> float:
        """The smallest positive number that carries the full precision."""
        return 2.0**self.min_exponent

    @property
    def largest(self) -> float:
        """The largest finite number."""
        return (2.0 - 2.0 ** (1 - self.precision)) * 2.0**self.max_exponent


FORMATS: Mapping[str, Format] = MappingProxyType(
    {
        "float32": Format("float32", 24, -126, 127, gradual=False),
        "bfloat16": Format("bfloat16", 8, -126, 127, gradual=False),
        "float16": Format("float16", 11, -14, 15, gradual=True),
    }
)

FLOAT64 = Format("float64", 53, -1022, 1023, gradual=True)

# What NVIDIA's tensor cores take float32 operands to unless told not to; nothing is stored in it.
TF32 = Format("tf32", 11, -126, 127, gradual=False)


def format_named(name: str) -> Format:
    """The format called `name`. ValueError for a name that is not in `FORMATS`."""
    try:
        return FORMATS[name]
    except KeyError:
        known = ", ".join(f"`{known}`" for known in FORMATS)
        raise ValueError(f"Unknown format `{name}`. Known formats: {known}.") from None


def round_to(x: FloatArray | float, fmt: Format | str) -> NDArray[np.float64]:
    """`x` rounded once, to nearest with ties to even, into `fmt`; float64 values, shape kept.

    |x| is k 2^q with q = max(exponent of x, min_exponent) - precision + 1 the weight of the last
    bit that the format keeps there. Dividing by 2^q, `rint` (ties to even) and multiplying back are
    exact but for the one rounding intended, subnormal numbers included. What lands above `largest`
    is an infinity, as in IEEE 754; infinities and NaN pass.
    """
    fmt = format_named(fmt) if isinstance(fmt, str) else fmt
    values = np.asarray(x, dtype=np.float64)
    _, exponent = np.frexp(values)  # |values| in [2^(exponent - 1), 2^exponent)
    weight = np.maximum(exponent - 1, fmt.min_exponent) - fmt.precision + 1
    with np.errstate(over="ignore", invalid="ignore"):
        rounded = np.ldexp(np.rint(np.ldexp(values, -weight)), weight)
    rounded = np.where(np.isfinite(values), rounded, values)
    overflowed = np.abs(rounded) > fmt.largest
    return np.where(overflowed, np.copysign(np.inf, rounded), rounded)


def power_of_two_below(magnitudes: NDArray[np.float64]) -> NDArray[np.float64]:
    """The largest power of two that does not exceed each magnitude; 0 for 0.

    Rounding v >= 0 to nearest errs by at most half a unit in its last place, which is roundoff
    times this: up to twice as sharp as roundoff times v, and never more.
    """
    _, exponent = np.frexp(magnitudes)
    return np.where(magnitudes > 0, np.ldexp(1.0, exponent - 1), 0.0)

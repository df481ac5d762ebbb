"""The code books of bitsandbytes, derived from their definitions bit for bit."""

from __future__ import annotations

from functools import lru_cache
from statistics import NormalDist
from typing import Literal

import numpy as np
from numpy.typing import NDArray

__all__ = ["QuantType", "codebook", "dynamic_map", "fp4", "nf4"]

F32 = NDArray[np.float32]
QuantType = Literal["nf4", "fp4"]

# QLoRA (arXiv 2305.14314) takes 1 - (1/32 + 1/30) / 2 = 0.96770833...; the published table was made
# with this rounded figure, and six of its entries would differ in the last bits otherwise.
OFFSET = 0.9677083


def codebook(quant_type: QuantType) -> F32:
    """The sixteen values, (16,), in the order of their codes. ValueError for another type."""
    if quant_type == "nf4":
        return nf4()
    if quant_type == "fp4":
        return fp4()
    raise ValueError(f"`quant_type` must be 'nf4' or 'fp4', got {quant_type!r}.")


@lru_cache(maxsize=1)
def nf4() -> F32:
    """NormalFloat: equally spaced quantiles of N(0, 1), in two halves that share their zero.

    Eight positive values from the quantiles 0.9677083 .. 1/2, seven negative ones from their mirror
    image with one step fewer, and zero, sorted and divided by the largest (QLoRA, section 3).
    The probabilities and the division are float32, the quantile function is double.
    """
    normal = NormalDist()
    positive = [normal.inv_cdf(float(p)) for p in _linspace(OFFSET, 0.5, 9)[:-1]]
    negative = [-normal.inv_cdf(float(p)) for p in _linspace(OFFSET, 0.5, 8)[:-1]]
    values = np.sort(np.array([*positive, 0.0, *negative], dtype=np.float32))
    return _frozen(values / values.max())


@lru_cache(maxsize=1)
def fp4() -> F32:
    """A sign, two exponent bits and one mantissa bit, divided by the largest value, 12.

    Code 0bsxxx: x = 000 is zero and 001 the one subnormal, 2^-4. The other exponents are stored out
    of order: 11, 10, 01 stand for 2, 4 and 8, and the mantissa bit adds half. Code 8 is a second
    zero.
    """
    half = [0.0, 2.0**-4]
    for exponent in (0b01, 0b10, 0b11):
        power = 2.0 ** (4 - exponent)
        half += [power, 1.5 * power]
    magnitudes = np.array(half, dtype=np.float32)
    return _frozen(np.concatenate([magnitudes, -magnitudes]) / magnitudes.max())


@lru_cache(maxsize=1)
def dynamic_map() -> F32:
    """The signed dynamic 8-bit data type, sorted, (256,): arXiv 1511.04561.

    For each decade 10^-6 .. 10^0, the i-th has 2^i fraction items: the middles of equal parts of
    [0.1, 1], with both signs; zero and one complete it.
    """
    values = [0.0, 1.0]
    for i in range(7):
        edges = _linspace(0.1, 1.0, 2**i + 1)
        middles = np.float32(10.0 ** (i - 6)) * ((edges[:-1] + edges[1:]) / np.float32(2))
        values += [*middles.tolist(), *(-middles).tolist()]
    return _frozen(np.sort(np.array(values, dtype=np.float32)))


def _linspace(start: float, stop: float, steps: int) -> F32:
    """`steps` points as torch.linspace makes them in float32: from both ends, with fused products.

    step = fl((stop - start) / (steps - 1)); the first half is fl(start + i step), the second
    fl(stop - (steps - 1 - i) step), each rounded once. In double the fused form is exact.
    """
    first, last = np.float32(start), np.float32(stop)
    step = float((last - first) / np.float32(steps - 1))
    i = np.arange(steps)
    rising = float(first) + step * i
    falling = float(last) - step * (steps - 1 - i)
    return np.where(i < steps // 2, rising, falling).astype(np.float32)


def _frozen(values: F32) -> F32:
    """The array, read-only: every caller shares it."""
    values.flags.writeable = False
    return values

"""Blockwise quantisation: 4-bit weights, and the 8-bit quantisation of their scales.

What bitsandbytes 0.50.2 computes on the CPU, bit for bit; all arithmetic is float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from math import prod
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from reference.codebooks import QuantType, codebook, dynamic_map
from reference.formats import round_to

__all__ = [
    "NestedAbsmax",
    "dequantize_4bit",
    "dequantize_absmax",
    "quantize_4bit",
    "quantize_absmax",
]

F32 = NDArray[np.float32]
U8 = NDArray[np.uint8]

SMALLEST_SCALE = np.float32(1e-38)  # bitsandbytes' guard against dividing by a zero absmax.
SCALES_BLOCKSIZE = 256
GRID = 65536  # bitsandbytes' CPU kernel looks 8-bit codes up in a table of this many cells.


class NestedAbsmax(NamedTuple):
    """Doubly quantised absmax: codes (blocks,), their absmax (blocks / 256,), and the offset."""

    codes: U8
    absmax: F32
    offset: np.float32


def quantize_4bit(
    weight: NDArray[np.floating], quant_type: QuantType, blocksize: int = 64
) -> tuple[U8, F32]:
    """Packed codes ((size + 1) // 2,), the even element in the high nibble, and absmax (blocks,).

    weight: any shape; blocks run through its elements in C order, the last may be shorter. Values
    are scaled to [-1, 1] and take the nearest code; a value in the middle takes the lower one.
    Full blocks are multiplied by fl(1 / absmax), a short one is divided by its absmax. The guard
    1e-38 stays visible in the absmax of a short block of zeros, but not of a full one. The nibble
    that an odd size leaves over holds the code of zero: 7 for nf4, 0 for fp4.
    """
    flat = np.asarray(weight, dtype=np.float32).reshape(-1)
    full = flat.size - flat.size % blocksize
    blocks, rest = flat[:full].reshape(-1, blocksize), flat[full:]
    absmax = np.abs(blocks).max(axis=1, initial=0.0)
    inverse = np.float32(1.0) / np.maximum(absmax, SMALLEST_SCALE)
    scaled = [np.clip(blocks * inverse[:, None], -1, 1).reshape(-1)]
    if rest.size:
        last = np.maximum(np.abs(rest).max(), SMALLEST_SCALE)
        absmax = np.append(absmax, last)
        scaled.append(np.clip(rest / last, -1, 1))
    if flat.size % 2:
        scaled.append(np.zeros(1, dtype=np.float32))

    values = codebook(quant_type)
    # fp4 has two zeros: exactly zero and below take code 0, what lies just above takes code 8.
    order = np.argsort(values, kind="stable")
    middles = (values[order[:-1]] + values[order[1:]]) / np.float32(2)
    codes = order[np.searchsorted(middles, np.concatenate(scaled), side="left")].astype(np.uint8)
    packed: U8 = np.left_shift(codes[::2], 4) | codes[1::2]
    return packed, absmax.astype(np.float32)


def dequantize_4bit(
    packed: U8,
    absmax: F32,
    shape: Sequence[int],
    quant_type: QuantType,
    blocksize: int = 64,
    dtype: str = "float32",
) -> NDArray[np.float64]:
    """code · absmax in float32, rounded to the format `dtype`, in `shape`; as float64 values.

    packed: at least (prod(shape) + 1) // 2 bytes, of any shape. absmax: (blocks,).
    The AVX-512 kernel of bitsandbytes takes another block's absmax where a row is a multiple of 16
    but not of `blocksize` (it counts whole blocks to a row); this function does not.
    """
    flat, size = np.asarray(packed, dtype=np.uint8).reshape(-1), prod(shape)
    codes = np.stack([flat >> 4, flat & 0xF], axis=1).reshape(-1)[:size]
    scales = np.repeat(np.asarray(absmax, dtype=np.float32), blocksize)[:size]
    return round_to((codebook(quant_type)[codes] * scales).reshape(shape), dtype)


def quantize_absmax(absmax: F32, offset: np.float32 | None = None) -> NestedAbsmax:
    """Double quantisation: absmax (blocks,) less its mean, in 8 bits by blocks of 256.

    offset: the mean that the other implementation took, or None for the mean rounded once. PyTorch
    sums in float32, in an order of its own, so its mean may be a few units in the last place away,
    and single codes with it; given its offset, every byte agrees.
    """
    absmax = np.asarray(absmax, dtype=np.float32)
    if offset is None:
        offset = np.float32(absmax.astype(np.float64).mean()) if absmax.size else np.float32(0)
    centred = absmax - np.float32(offset)
    codes, scales = _quantize_8bit(centred)
    return NestedAbsmax(codes, scales, np.float32(offset))


def dequantize_absmax(nested: NestedAbsmax) -> F32:
    """fl(fl(code · absmax) + offset), (blocks,)."""
    scales = np.repeat(nested.absmax, SCALES_BLOCKSIZE)[: nested.codes.size]
    absmax: F32 = dynamic_map()[nested.codes] * scales + np.float32(nested.offset)
    return absmax


def _quantize_8bit(values: F32) -> tuple[U8, F32]:
    """Codes of the dynamic map by blocks of 256, and absmax; (n,) and (n / 256 rounded up,).

    The CPU kernel rounds the scaled value to one of 65,536 cells and takes the code that is nearest
    to the cell's middle, so near a boundary it may differ from the nearest code of the value. A
    block of zeros takes code 0, whose value -0.993 its zero absmax hides.
    """
    starts = np.arange(0, values.size, SCALES_BLOCKSIZE)
    if not values.size:
        return np.zeros(0, np.uint8), np.zeros(0, np.float32)
    absmax = np.maximum.reduceat(np.abs(values), starts)
    with np.errstate(divide="ignore", invalid="ignore"):
        inverse = np.repeat(np.float32(1.0) / absmax, SCALES_BLOCKSIZE)[: values.size]
        scaled = np.clip(values * inverse, -1, 1)
    alive = np.repeat(absmax > 0, SCALES_BLOCKSIZE)[: values.size]
    scaled = np.where(alive, scaled, np.float32(0))
    halved = (scaled + np.float32(1)) * np.float32(0.5)
    # Compilers may fuse the sum with the product; no input was found for which that shows.
    cell = (halved * np.float32(GRID - 1) + np.float32(0.5)).astype(np.int64)
    return np.where(alive, _cell_codes()[cell], 0).astype(np.uint8), absmax


@lru_cache(maxsize=1)
def _cell_codes() -> U8:
    """The code nearest to the middle of each cell, the lower one if two are as near; (65536,)."""
    values = dynamic_map()
    middles = np.float32(0.5) * (values[:-1] + values[1:])
    ramp = np.float32(2) * np.arange(GRID, dtype=np.float32)
    cells = np.float32(-1) + ramp / np.float32(GRID - 1)
    codes: U8 = np.searchsorted(middles, cells, side="left").astype(np.uint8)
    return codes

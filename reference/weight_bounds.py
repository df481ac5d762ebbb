"""Error bounds of dequantised weights, where conforming implementations may round differently."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import numpy as np
from numpy.typing import NDArray

from reference.arithmetic import Bounded
from reference.blockwise import SCALES_BLOCKSIZE, NestedAbsmax
from reference.codebooks import QuantType, codebook, dynamic_map
from reference.formats import FORMATS

__all__ = ["bound_nested_weight", "bound_rows"]

# fl(1 / 127), times SCB, times CB; or CB times SCB, over 127: three at most.
ROW_ROUNDINGS = 3


def bound_rows(codes: NDArray[np.int8], scales: NDArray[np.float32]) -> Bounded:
    """W = CB · SCB / 127, (out, in), dequantised in float32 in any order of the two factors."""
    single = FORMATS["float32"]
    W = codes.astype(np.float64) * scales.astype(np.float64)[:, None] / 127.0
    relative = (1.0 + single.roundoff) ** ROW_ROUNDINGS - 1.0
    underflow = np.where(W != 0, ROW_ROUNDINGS * 127.0 * single.underflow, 0.0)
    return Bounded(W, relative * np.abs(W) + underflow)


def bound_nested_weight(
    packed: NDArray[np.uint8],
    nested: NestedAbsmax,
    shape: Sequence[int],
    quant_type: QuantType,
    blocksize: int = 64,
) -> Bounded:
    """W = code · (code₂ · absmax₂ + offset), in `shape`, whether or not product and sum are fused.

    Separately rounded, the product p = code₂ absmax₂ errs by u |p|, the scale s = p + offset by
    u |s| more, and the weight by u |W|; fused, the first is left out. Second orders add less than
    3 u of that.
    """
    u, eta = FORMATS["float32"].roundoff, FORMATS["float32"].underflow
    size = prod(shape)
    flat = packed.reshape(-1)
    codes = np.stack([flat >> 4, flat & 0xF], axis=1).reshape(-1)[:size]
    outer = np.repeat(nested.absmax, SCALES_BLOCKSIZE)[: nested.codes.size].astype(np.float64)
    product = dynamic_map()[nested.codes].astype(np.float64) * outer  # blocks
    scale = product + float(nested.offset)  # blocks

    def each(values: NDArray[np.float64]) -> NDArray[np.float64]:
        """Values of the blocks, by elements of the weight."""
        return np.repeat(values, blocksize)[:size].reshape(shape)

    code = codebook(quant_type)[codes].astype(np.float64).reshape(shape)
    W = code * each(scale)
    errors = u * (np.abs(code) * each(np.abs(product) + np.abs(scale)) + np.abs(W))
    return Bounded(W, errors * (1.0 + 3.0 * u) + np.where(code != 0, 3.0 * eta, 0.0))

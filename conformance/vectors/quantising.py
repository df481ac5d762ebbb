"""Quantiser vectors: a weight in, packed codes and scales out, bit for bit.

What lies in the middle of two codes goes to either side by platform (bitsandbytes' own CPU and CUDA
kernels differ there), so such weights are drawn again until none is left.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from conformance.vectors.made import MadeOutput, MadeVector
from conformance.vectors.recipe import QuantiserRecipe
from conformance.vectors.streams import Stream
from conformance.vectors.tensors import Tensor
from conformance.vectors.truth import (
    ambiguous_codes,
    codebook,
    dynamic_map,
    quantize_4bit,
    quantize_absmax,
    quantize_rows,
    round_to,
)

__all__ = ["make_quantiser"]

F64 = NDArray[np.float64]
CLAUSE = "FWD-4"
BLOCKSIZE, OUTER_BLOCKSIZE = 64, 256
ATTEMPTS = 64
# A few roundings of a scaled value in float32; and one cell of the table of 65,536 in which
# bitsandbytes' CPU kernel looks 8-bit codes up.
SMALLEST_FP4 = 2.0**-4 / 12.0
SCALED_ROUNDINGS = 4 * 2.0**-24
CELL = 2.0**-15


def make_quantiser(recipe: QuantiserRecipe, seed: int) -> MadeVector:
    """The vector of a quantiser's recipe."""
    stream = Stream(seed, recipe.id)
    makers: dict[str, Callable[[QuantiserRecipe, Stream], MadeVector]] = {
        "nf4": _4bit,
        "fp4": _4bit,
        "nested": _nested,
        "int8": _rows,
    }
    return makers[recipe.kind](recipe, stream)


def _vector(
    recipe: QuantiserRecipe, inputs: dict[str, Tensor], outputs: dict[str, Tensor], blocksize: int
) -> MadeVector:
    return MadeVector(
        id=recipe.id,
        kind=f"quantise-{recipe.kind}",
        reason=recipe.reason,
        about={"blocksize": blocksize or None},
        inputs=inputs,
        outputs=tuple(
            MadeOutput(name, tensor.dtype, (CLAUSE,), CLAUSE, tensor)
            for name, tensor in outputs.items()
        ),
    )


def _redrawn(
    first: F64, doubtful: Callable[[F64], NDArray[np.bool_]], again: Callable[[int], F64]
) -> F64:
    """Values none of which is doubtful: the doubtful ones are replaced until none is left."""
    values = first
    for attempt in range(ATTEMPTS):
        bad = doubtful(values)
        if not bad.any():
            return values
        values = np.where(bad, again(attempt), values)
    raise ValueError(f"No values beyond doubt in {ATTEMPTS} attempts.")


def _between(scaled: F64, values: NDArray[np.float32], margin: float) -> NDArray[np.bool_]:
    """Where a scaled value is within `margin` of the middle of two neighbouring codes."""
    ordered = np.unique(values.astype(np.float64))
    middles = (ordered[:-1] + ordered[1:]) / 2.0
    return np.asarray((np.abs(scaled[..., None] - middles) <= margin).any(axis=-1))


def _4bit(recipe: QuantiserRecipe, stream: Stream) -> MadeVector:
    quant_type = recipe.kind
    if quant_type not in ("nf4", "fp4"):
        raise ValueError(f"{recipe.id}: `{quant_type}` is not a 4-bit type.")
    size = math.prod(recipe.shape)

    def doubtful(flat: F64) -> NDArray[np.bool_]:
        starts = np.arange(0, size, BLOCKSIZE)
        absmax = np.repeat(np.maximum.reduceat(np.abs(flat), starts), BLOCKSIZE)[:size]
        scaled = np.divide(flat, absmax, out=np.zeros_like(flat), where=absmax > 0)
        near = _between(scaled, codebook(quant_type), SCALED_ROUNDINGS)
        # fp4 has two zeros, and platforms differ in which of them a small positive number takes.
        zeros = np.abs(scaled) < (SMALLEST_FP4 / 2.0 if quant_type == "fp4" else 0.0)
        return np.asarray((near | zeros) & (flat != 0))

    first = stream.bell("weight", (size,))
    if recipe.name == "zeros":
        first[BLOCKSIZE : 2 * BLOCKSIZE] = 0.0
    flat = _redrawn(first, doubtful, lambda k: stream.bell(f"weight/{k}", (size,)))
    weight = flat.reshape(recipe.shape)
    packed, absmax = quantize_4bit(weight.astype(np.float32), quant_type)
    return _vector(
        recipe,
        {"weight": Tensor.of(weight, "F32")},
        {"packed": Tensor.of(packed, "U8"), "absmax": Tensor.of(absmax, "F32")},
        BLOCKSIZE,
    )


def _nested(recipe: QuantiserRecipe, stream: Stream) -> MadeVector:
    size = math.prod(recipe.shape)

    def drawn(name: str) -> F64:
        return np.abs(stream.bell(name, (size,))) + 0.25

    absmax = drawn("absmax")
    offset = np.float32(math.fsum(absmax.tolist()) / size)

    def doubtful(values: F64) -> NDArray[np.bool_]:
        centred = values.astype(np.float32) - offset
        starts = np.arange(0, size, OUTER_BLOCKSIZE)
        outer = np.repeat(np.maximum.reduceat(np.abs(centred), starts), OUTER_BLOCKSIZE)[:size]
        return _between(centred.astype(np.float64) / outer, dynamic_map(), CELL)

    # The offset is an input, since the mean of a float32 sum depends on its order.
    values = _redrawn(absmax, doubtful, lambda k: drawn(f"absmax/{k}"))
    nested = quantize_absmax(values.astype(np.float32), offset)
    return _vector(
        recipe,
        {"absmax": Tensor.of(values, "F32"), "absmax_offset": Tensor.of(np.asarray(offset), "F32")},
        {
            "absmax_codes": Tensor.of(nested.codes, "U8"),
            "absmax_absmax": Tensor.of(nested.absmax, "F32"),
        },
        OUTER_BLOCKSIZE,
    )


def _rows(recipe: QuantiserRecipe, stream: Stream) -> MadeVector:
    size = 2.0 ** (3.0 * np.arange(recipe.shape[0]) - 6.0)[:, None]
    size[-1] = 0.0

    def drawn(name: str) -> F64:
        return round_to(stream.bell(name, recipe.shape) * size, "float16")

    weight = _redrawn(drawn("weight"), ambiguous_codes, lambda k: drawn(f"weight/{k}"))
    codes, scales = quantize_rows(weight)
    return _vector(
        recipe,
        {"weight": Tensor.of(weight, "F32")},
        {"CB": Tensor.of(codes, "I8"), "SCB": Tensor.of(scales, "F32")},
        0,
    )

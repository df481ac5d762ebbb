"""The base layer of a vector: its quantised weight as tensors, what y and dx it gives, and how exactly."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from conformance.vectors.arrays import THRESHOLD, Arrays
from conformance.vectors.recipe import TENSOR_DTYPES, Recipe
from conformance.vectors.tensors import Tensor
from conformance.vectors.truth import (
    Arithmetic,
    Bounded,
    QuantType,
    bound_base_dx,
    bound_base_output,
    bound_int8_dx,
    bound_int8_output,
    bound_int8_train,
    bound_nested_weight,
    bound_rows,
    dequantize_4bit,
    quantize_4bit,
    quantize_absmax,
    quantize_rows,
)

__all__ = ["Base", "base_of", "in_order"]

F64 = NDArray[np.float64]


@dataclass(frozen=True)
class Base:
    """tensors: what a port is given of it. weight: W and its bound (zeros: its bits), or None.

    y (*batch, out) and dx (*batch, in): true values, summed in a fixed order. y_bound and dx_bound:
    by "float32" and "input", what a conforming base layer may err by. All zeros where they are given.
    """

    tensors: dict[str, Tensor]
    weight: Bounded | None
    y: F64
    dx: F64
    y_bound: dict[str, F64]
    dx_bound: dict[str, F64]


def in_order(left: F64, right: F64) -> F64:
    """left @ right, each sum from left to right: a BLAS's order depends on the machine it runs on."""
    return np.asarray(left.astype(object) @ right.astype(object)).astype(np.float64)


def base_of(recipe: Recipe, arrays: Arrays, arithmetics: dict[str, Arithmetic]) -> Base:
    """The base layer of a vector."""
    if recipe.kind == "given":
        return _given(recipe, arrays)
    if recipe.kind.startswith("int8"):
        return _int8(recipe, arrays, arithmetics)
    return _4bit(recipe, arrays, arithmetics)


def _given(recipe: Recipe, arrays: Arrays) -> Base:
    dtype = TENSOR_DTYPES[recipe.dtype]
    tensors = {
        "base": Tensor.of(arrays.base, dtype),
        "base_dx": Tensor.of(arrays.base_dx, dtype),
    }
    y0, dx0 = np.zeros_like(arrays.base), np.zeros_like(arrays.base_dx)
    both = ("float32", "input")
    return Base(
        tensors,
        None,
        arrays.base,
        arrays.base_dx,
        dict.fromkeys(both, y0),
        dict.fromkeys(both, dx0),
    )


def _bias(recipe: Recipe, arrays: Arrays) -> dict[str, Tensor]:
    if arrays.bias is None:
        return {}
    return {"bias": Tensor.of(arrays.bias, TENSOR_DTYPES[recipe.dtype])}


def _4bit(recipe: Recipe, arrays: Arrays, arithmetics: dict[str, Arithmetic]) -> Base:
    quant_type: QuantType = "fp4" if recipe.kind.startswith("fp4") else "nf4"
    shape = (recipe.out_features, recipe.in_features)
    packed, absmax = quantize_4bit(arrays.weight.astype(np.float32), quant_type)
    tensors = {"packed": Tensor.of(packed, "U8"), **_bias(recipe, arrays)}
    if recipe.kind.endswith("nested"):
        offset = np.float32(math.fsum(absmax.tolist()) / absmax.size)
        scales = quantize_absmax(absmax, offset)
        tensors |= {
            "absmax_codes": Tensor.of(scales.codes, "U8"),
            "absmax_absmax": Tensor.of(scales.absmax, "F32"),
            "absmax_offset": Tensor.of(np.asarray(scales.offset), "F32"),
        }
        W = bound_nested_weight(packed, scales, shape, quant_type)
    else:
        tensors["absmax"] = Tensor.of(absmax, "F32")
        value = dequantize_4bit(packed, absmax, shape, quant_type)
        W = Bounded(value, np.zeros_like(value))

    y = {k: bound_base_output(arrays.x, W.value, arrays.bias, a) for k, a in arithmetics.items()}
    dx = {k: bound_base_dx(arrays.dout, W.value, a) for k, a in arithmetics.items()}
    off_y, off_dx = np.abs(arrays.x) @ W.bound.T, np.abs(arrays.dout) @ W.bound
    return Base(
        tensors,
        W,
        _linear(arrays.x, W.value, arrays.bias),
        in_order(arrays.dout, W.value),
        {k: b.bound + off_y * (1.0 + 8.0 * arithmetics[k].io.roundoff) for k, b in y.items()},
        {k: b.bound + off_dx * (1.0 + 8.0 * arithmetics[k].io.roundoff) for k, b in dx.items()},
    )


def _int8(recipe: Recipe, arrays: Arrays, arithmetics: dict[str, Arithmetic]) -> Base:
    codes, scales = quantize_rows(arrays.weight)
    W = bound_rows(codes, scales)
    threshold = THRESHOLD if recipe.kind == "int8-outliers" else 0.0
    n, m = recipe.in_features, recipe.out_features
    rows, shape = arrays.x.reshape(-1, n), (*recipe.batch, m)
    if recipe.kind == "int8-train":
        value = _linear(arrays.x, W.value, arrays.bias)
        y = {
            k: bound_int8_train(arrays.x, codes, scales, arrays.bias, a).bound
            for k, a in arithmetics.items()
        }
    else:
        value = _quantised(rows, codes, scales, arrays.bias, threshold, arithmetics["float32"])
        value = value.reshape(shape)
        y = {
            k: bound_int8_output(rows, codes, scales, arrays.bias, a, threshold).bound.reshape(
                shape
            )
            for k, a in arithmetics.items()
        }
    tensors = {"CB": Tensor.of(codes, "I8"), "SCB": Tensor.of(scales, "F32")}
    return Base(
        {**tensors, **_bias(recipe, arrays)},
        W,
        value,
        in_order(arrays.dout, W.value),
        y,
        {k: bound_int8_dx(arrays.dout, codes, scales, a).bound for k, a in arithmetics.items()},
    )


def _linear(x: F64, W: F64, bias: F64 | None) -> F64:
    y = in_order(x, W.T)
    return y if bias is None else y + bias


def _quantised(
    rows: F64,
    codes: NDArray[np.int8],
    scales: NDArray[np.float32],
    bias: F64 | None,
    threshold: float,
    arithmetic: Arithmetic,
) -> F64:
    """LLM.int8()'s y, (rows, out). Sums of codes are exact in any order; outliers are summed in order.

    An outlier column leaves with all its elements; the vectors' rows have their absmax elsewhere,
    so it does not matter whether its small elements count for that.
    """
    outlying = (
        (np.abs(rows) >= threshold).any(axis=0) if threshold else np.zeros(rows.shape[1], bool)
    )
    kept = np.where(outlying, 0.0, rows)
    y = bound_int8_output(kept, codes, scales, bias, arithmetic).value
    return y + in_order(rows[:, outlying], bound_rows(codes, scales).value[:, outlying].T)

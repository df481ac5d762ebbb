"""From a recipe to a vector: the true outputs, and the bound or the certificate of each.

True values are sums from left to right in float64, by the reference's own formulas on Python's
numbers, so they are the same on every machine. Bounds come from BLAS, whose last bits are not: they
are rounded up to twelve bits, 0.06 % at most, which leaves those bits no say.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from conformance.vectors.arrays import THRESHOLD, Arrays, draw, stored_ranknum
from conformance.vectors.bases import Base, base_of
from conformance.vectors.made import MadeOutput, MadeVector
from conformance.vectors.recipe import TENSOR_DTYPES, Recipe
from conformance.vectors.tensors import Tensor
from conformance.vectors.truth import (
    FORMATS,
    Adapter,
    AdapterGradients,
    Arithmetic,
    Bounded,
    backward,
    bound_gradients,
    bound_output,
    forward,
    gradients_in_domain,
    in_domain,
)

__all__ = ["make_layer", "rounded_up"]

F64 = NDArray[np.float64]
Bounds = dict[str, F64]
BOUND_BITS = 12
ATTEMPTS = 16
GRADIENT_CLAUSES = {"dx": "GRAD-1", "dA": "GRAD-2", "dE": "GRAD-3", "dB": "GRAD-4"}


def make_layer(recipe: Recipe, seed: int) -> MadeVector:
    """The vector of a recipe.

    Raises:
        ValueError: when a conforming implementation might leave the range of a format, or when no
            arrays are found whose bits are determined.
    """
    claims = _arithmetics(recipe)
    for attempt in range(ATTEMPTS):
        arrays = draw(recipe, seed, attempt)
        base = base_of(recipe, arrays, claims)
        active = [a for a, r in zip(arrays.adapters, recipe.adapters, strict=True) if r.active]
        proven = _certificates(recipe, arrays, active, base)
        if all(proven.values()):
            break
    else:
        raise ValueError(f"{recipe.id}: no bits that are determined, in {ATTEMPTS} attempts.")
    if recipe.values not in ("steep", "swamped"):
        _require_domain(recipe, arrays, active, base, claims)
    outputs = [
        output
        for output in (
            *_weight_output(base),
            *_layer_outputs(recipe, arrays, active, base, claims, proven),
        )
        if not recipe.only or output.name in recipe.only
    ]
    return MadeVector(
        id=recipe.id,
        kind=recipe.kind,
        reason=recipe.reason,
        about=_about(recipe),
        inputs=_inputs(recipe, arrays, base),
        outputs=tuple(outputs),
    )


def rounded_up(bound: F64) -> F64:
    """The bound in twelve significant bits, never less than it was."""
    mantissa, exponent = np.frexp(bound * (1.0 + 2.0**-14))
    return np.asarray(np.ldexp(np.ceil(mantissa * 2.0**BOUND_BITS), exponent - BOUND_BITS))


def _arithmetics(recipe: Recipe) -> dict[str, Arithmetic]:
    """What a port may claim; where only the wider range of float32 will do, both are that."""
    strict = Arithmetic.strict(recipe.dtype)
    steep = recipe.values == "steep"
    return {"float32": strict, "input": strict if steep else Arithmetic.permissive(recipe.dtype)}


def _require_domain(
    recipe: Recipe, arrays: Arrays, active: list[Adapter], base: Base, claims: dict[str, Arithmetic]
) -> None:
    x, dout = arrays.x, arrays.dout
    for name, arithmetic in claims.items():
        if not in_domain(x, active, base.y, arithmetic):
            raise ValueError(f"{recipe.id}: y may leave the range of {name} arithmetic.")
        asked = recipe.only != ("y",)
        if asked and not gradients_in_domain(x, active, dout, base.dx, arithmetic):
            raise ValueError(f"{recipe.id}: a gradient may leave the range of {name} arithmetic.")


def _about(recipe: Recipe) -> dict[str, Any]:
    """What a port must know beside tensors."""
    quantised_4bit = recipe.kind.startswith(("nf4", "fp4"))
    return {
        "dtype": TENSOR_DTYPES[recipe.dtype],
        "in_features": recipe.in_features,
        "out_features": recipe.out_features,
        "batch": list(recipe.batch),
        "blocksize": 64 if quantised_4bit else None,
        "threshold": THRESHOLD if recipe.kind == "int8-outliers" else 0.0,
        "adapters": [
            {
                "name": a.name,
                "active": a.active,
                "r": a.r,
                "lora_alpha": a.alpha,
                "ranknum": stored_ranknum(a),
                "dropout": a.p,
            }
            for a in recipe.adapters
        ],
    }


def _inputs(recipe: Recipe, arrays: Arrays, base: Base) -> dict[str, Tensor]:
    dtype = TENSOR_DTYPES[recipe.dtype]
    inputs = {"x": Tensor.of(arrays.x, dtype), "dout": Tensor.of(arrays.dout, dtype)}
    inputs |= base.tensors
    for spec, a in zip(recipe.adapters, arrays.adapters, strict=True):
        for name, values in (("A", a.A), ("E", a.E), ("B", a.B)):
            inputs[f"{spec.name}/{name}"] = Tensor.of(values, "F32")
        if a.keep is not None:
            inputs[f"{spec.name}/keep"] = Tensor.of(a.keep, "U8")
    return inputs


def _weight_output(base: Base) -> Iterator[MadeOutput]:
    if base.weight is None:
        return
    W, bound = base.weight
    exact = not bound.any()
    yield MadeOutput(
        "W",
        "F32",
        ("FWD-4",),
        "FWD-4",
        Tensor.of(W, "F32" if exact else "F64"),
        None if exact else {"float32": rounded_up(bound), "input": rounded_up(bound)},
    )


def _layer_outputs(
    recipe: Recipe,
    arrays: Arrays,
    active: list[Adapter],
    base: Base,
    claims: dict[str, Arithmetic],
    proven: dict[str, bool],
) -> Iterator[MadeOutput]:
    """y, dx, and dA, dE and dB of each active adapter."""
    dtype, names = TENSOR_DTYPES[recipe.dtype], [a.name for a in recipe.adapters if a.active]
    y, gradients = _in_order(arrays.x, arrays.dout, active)
    y += base.y
    dx = base.dx + sum((g.dx for g in gradients), np.zeros_like(base.dx))
    y_bounds, dx_bounds, leaf_bounds = _bounds(arrays, active, base, claims)

    def output(
        name: str, stored: str, clauses: tuple[str, ...], rule: str, value: F64, bounds: Bounds
    ) -> MadeOutput:
        exact = proven.get(name, not any(b.any() for b in bounds.values()))
        return MadeOutput(
            name,
            stored,
            clauses,
            rule,
            # What is demanded to the bit, the dtype must hold.
            Tensor.of(Tensor.of(value, stored).values if exact else value, "F64"),
            None if exact else {k: rounded_up(b) for k, b in bounds.items()},
        )

    def serves(part: str) -> tuple[str, ...]:
        return (*recipe.backward, GRADIENT_CLAUSES[part])

    yield output("y", dtype, recipe.forward, "DTYPE-1", y, y_bounds)
    yield output("dx", dtype, serves("dx"), "DTYPE-6", dx, dx_bounds)
    for name, gradient, bounds in zip(names, gradients, leaf_bounds, strict=True):
        for part in ("dA", "dE", "dB"):
            value = getattr(gradient, part)
            key = f"{name}/{part}"
            yield output(key, "F32", serves(part), "GRAD-12", value, bounds[part])


def _in_order(x: F64, dout: F64, adapters: list[Adapter]) -> tuple[F64, list[AdapterGradients]]:
    """The sum of the updates, and the gradients of each: the reference's formulas, in a fixed order.

    NumPy multiplies matrices of Python's numbers term by term, in float64, and never by BLAS.
    """
    delta, gradients = np.zeros_like(dout), []
    for a in adapters:
        boxed = replace(a, A=a.A.astype(object), E=a.E.astype(object), B=a.B.astype(object))
        value, cache = forward(x.astype(object), boxed)
        delta = delta + np.asarray(value).astype(np.float64)
        found = backward(dout.astype(object), cache)
        gradients.append(AdapterGradients(*(np.asarray(g).astype(np.float64) for g in found)))
    return delta, gradients


def _bounds(
    arrays: Arrays, active: list[Adapter], base: Base, claims: dict[str, Arithmetic]
) -> tuple[Bounds, Bounds, list[dict[str, Bounds]]]:
    """The bounds of y, of dx, and by adapter of dA, dE and dB, under each arithmetic."""
    y_bounds: Bounds = {}
    dx_bounds: Bounds = {}
    leaves: list[dict[str, Bounds]] = [{"dA": {}, "dE": {}, "dB": {}} for _ in active]
    for name, arithmetic in claims.items():
        # y's own roundings are relative to a base output that may be off by its bound.
        wider = 1.0 + 4.0 * arithmetic.io.roundoff
        y = bound_output(arrays.x, active, base.y, arithmetic)
        y_bounds[name] = y.bound + base.y_bound[name] * wider
        dx, found = bound_gradients(arrays.x, active, arrays.dout, base.dx, arithmetic)
        dx_bounds[name] = dx.bound + base.dx_bound[name] * wider
        for leaf, gradient in zip(leaves, found, strict=True):
            for part in leaf:
                bounded: Bounded = getattr(gradient, part)
                leaf[part][name] = bounded.bound
    return y_bounds, dx_bounds, leaves


def _certificates(
    recipe: Recipe, arrays: Arrays, active: list[Adapter], base: Base
) -> dict[str, bool]:
    """On exact data, which outputs have the same bits in every order of evaluation.

    All terms of all sums are multiples of a quantum; while the sum of their magnitudes is below
    2^precision quanta, every partial sum and every stored intermediate is exact in the dtype.
    """
    if recipe.values == "swamped":
        # 2^p + 1 + 1 - 2^p: exact in the accumulator, and its result, 2, in the dtype.
        return {"y": True}
    if recipe.values != "dyadic":
        return {}
    bits = FORMATS[recipe.dtype].precision
    sizes = [replace(a, A=np.abs(a.A), E=np.abs(a.E), B=np.abs(a.B)) for a in active]
    total, found = _in_order(np.abs(arrays.x), np.abs(arrays.dout), sizes)
    total_dx = sum((g.dx for g in found), np.zeros_like(base.dx))
    if recipe.kind == "given":
        total, total_dx = total + np.abs(base.y), total_dx + np.abs(base.dx)
    elif base.weight is not None:
        W = np.abs(base.weight.value)
        total = total + np.abs(arrays.x) @ W.T
        total = total if arrays.bias is None else total + np.abs(arrays.bias)
        total_dx = total_dx + np.abs(arrays.dout) @ W
    quantum = min(
        [min(a.c, 1.0) * min(float(np.abs(a.E)[a.E != 0].min(initial=1.0)), 1.0) for a in active]
    )

    def fits(size: F64) -> bool:
        return float(size.max(initial=0.0)) <= quantum * 2.0**bits

    proven = {"y": fits(total), "dx": fits(total_dx)}
    for spec, gradient in zip((a for a in recipe.adapters if a.active), found, strict=True):
        for part in ("dA", "dE", "dB"):
            proven[f"{spec.name}/{part}"] = fits(getattr(gradient, part))
    return proven

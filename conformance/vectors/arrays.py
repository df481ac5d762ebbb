"""The arrays of a layer vector: families of values, each chosen for the faults that it shows."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import numpy as np
from numpy.typing import NDArray

from conformance.vectors.recipe import AdapterRecipe, Recipe
from conformance.vectors.streams import Stream
from conformance.vectors.truth import Adapter, ambiguous_codes, round_to

__all__ = ["THRESHOLD", "Arrays", "draw"]

F64 = NDArray[np.float64]
THRESHOLD = 6.0  # LLM.int8()'s own outlier threshold.
OUTLIERS = (1, 4)  # Columns of x that hold outliers, in the vectors that have them.
ATTEMPTS = 32


@dataclass(frozen=True)
class Arrays:
    """Inputs in float64, each exact in the dtype that the port gets it in.

    x, base_dx: (*batch, in). dout, base: (*batch, out). weight: (out, in), before quantisation.
    bias: (out,) or None. adapters: in the recipe's order, inactive ones too.
    """

    x: F64
    dout: F64
    base: F64
    base_dx: F64
    weight: F64
    bias: F64 | None
    adapters: tuple[Adapter, ...]


def draw(recipe: Recipe, seed: int, attempt: int = 0) -> Arrays:
    """The arrays of a recipe; the same for the same seed and attempt, on every machine."""
    stream = Stream(seed, f"{recipe.id}/again-{attempt}" if attempt else recipe.id)
    n, m, batch = recipe.in_features, recipe.out_features, recipe.batch
    family = _dyadic if recipe.exact else _bell
    drawn = family(recipe, stream)
    x = _special_x(recipe, drawn.x)
    dtype, scale = recipe.dtype, recipe.base_scale
    return Arrays(
        x=_quantisable(recipe, stream, x),
        dout=round_to(drawn.dout.reshape((*batch, m)), dtype),
        base=round_to(drawn.base * scale, dtype),
        base_dx=round_to(drawn.base_dx.reshape((*batch, n)) * scale, dtype),
        weight=round_to(drawn.weight * scale, dtype),
        bias=round_to(drawn.bias, dtype) if recipe.bias and drawn.bias is not None else None,
        adapters=drawn.adapters,
    )


def scaling(adapter: AdapterRecipe) -> float:
    """What the contract makes of lora_alpha."""
    return adapter.alpha if adapter.alpha > 0 else float(adapter.r)


def stored_ranknum(adapter: AdapterRecipe) -> float:
    """The float32 ranknum that a port is given."""
    if adapter.power is not None:
        return float(np.float32(2.0**adapter.power - 1e-5))
    return float(np.float32(adapter.r if adapter.ranknum is None else adapter.ranknum))


def true_ranknum(adapter: AdapterRecipe) -> float:
    """The ranknum of the float64 contract.

    On exact data the divisor is what float32 makes of ranknum + 1e-5, a power of two, so here it is
    the float64 number that gives this power; else it is the stored one.
    """
    if adapter.power is None:
        return stored_ranknum(adapter)
    power = 2.0**adapter.power
    ranknum = power - 1e-5
    stored = np.float32(stored_ranknum(adapter))
    if ranknum + 1e-5 != power or stored + np.float32(1e-5) != np.float32(power):
        raise ValueError(f"2^{adapter.power} is not the sum of a ranknum and 1e-5.")
    return ranknum


def _adapter(recipe: Recipe, a: AdapterRecipe, A: F64, E: F64, B: F64, stream: Stream) -> Adapter:
    """The adapter with its mask, and E as its recipe wants it."""
    if a.singular == "negative":
        E = -np.abs(E) - 2.0**-6
    elif a.singular == "zero":
        E = np.zeros_like(E)
    elif a.singular == "masked":
        E = np.where(np.arange(a.r)[:, None] == a.r // 2, E + 0.5, 0.0)
    shape = (*recipe.batch, recipe.in_features)
    return Adapter(
        round_to(A, "float32"),
        round_to(E, "float32"),
        round_to(B, "float32"),
        scaling=scaling(a),
        ranknum=true_ranknum(a),
        keep=stream.keep(f"{a.name}/keep", shape, a.p) if a.p else None,
        p=a.p,
    )


def _bell(recipe: Recipe, stream: Stream) -> Arrays:
    """Base and update of order one, and what a family makes of them."""
    n, m, batch = recipe.in_features, recipe.out_features, recipe.batch
    narrow = 2.0 ** -((n.bit_length() - 1) // 2)  # about 1 / sqrt(in)
    x, dout = stream.bell("x", (*batch, n)), stream.bell("dout", (*batch, m))
    factors = {"lora": (0.02 / narrow, 0.05, 0.02), "tiny": (1.0, 2.0**-8, 1.0)}
    of_A, of_E, of_B = factors.get(recipe.values, (1.0, 1.0, 1.0))
    adapters = []
    for a in recipe.adapters:
        A = stream.bell(f"{a.name}/A", (a.r, n)) * narrow * of_A
        E = stream.bell(f"{a.name}/E", (a.r, 1)) * of_E
        B = stream.bell(f"{a.name}/B", (m, a.r)) * of_B
        if recipe.values == "heavy":
            A = A * stream.choice(f"{a.name}/A2", A.shape, (0.125, 0.5, 1.0, 2.0, 8.0))
        if recipe.values == "cancelling":
            nearly = stream.bell(f"{a.name}/A2", A.shape) * 2.0**-10
            for j in range(1, a.r, 2):
                A[j] = A[j - 1] * (1.0 + nearly[j])
                E[j], B[:, j] = -E[j - 1], B[:, j - 1]
        if recipe.values == "steep":
            A, E, B = np.full_like(A, 32.0), np.ones_like(E), np.full_like(B, 512.0)
        adapters.append(_adapter(recipe, a, A, E, B, stream))
    if recipe.values == "tiny":
        x, dout = x * 2.0**-8, dout * 2.0**-8
    if recipe.values == "heavy":
        x = x * stream.choice("x2", x.shape, (0.125, 0.5, 1.0, 2.0, 8.0))
        x[..., n // 3] *= 60.0
        x = np.clip(x, -300.0, 300.0)
    return Arrays(
        x=x,
        dout=dout,
        base=stream.bell("base", (*batch, m)),
        base_dx=stream.bell("base_dx", (*batch, n)),
        weight=stream.bell("weight", (m, n)) * narrow,
        bias=stream.bell("bias", (m,)),
        adapters=tuple(adapters),
    )


def _dyadic(recipe: Recipe, stream: Stream) -> Arrays:
    """x, A, B, dout and W in {-1, 0, 1}, E in {±1/2, ±1, ±2}: few live features keep sums short.

    W has a 1 at the head of each row and of each block of 64: its scales are 1, its codes exact.
    """
    n, m, batch = recipe.in_features, recipe.out_features, recipe.batch

    def signs(name: str, shape: tuple[int, ...], density: float) -> F64:
        alive = stream.uniform(f"{name}/alive", shape) < density
        return np.where(alive, stream.choice(name, shape, (-1.0, 1.0)), 0.0)

    weight = signs("weight", (m, n), 0.5)
    weight[:, 0] = 1.0
    weight.reshape(-1)[::64] = 1.0
    adapters = []
    for a in recipe.adapters:
        A = signs(f"{a.name}/A", (a.r, n), 0.7)
        E = stream.choice(f"{a.name}/E", (a.r, 1), (-2.0, -1.0, -0.5, 0.5, 1.0, 2.0))
        B = signs(f"{a.name}/B", (m, a.r), min(1.0, 4.0 / max(a.r, 1)))
        if recipe.values == "swamped":
            A, E, B = np.ones_like(A), np.ones_like(E), np.ones_like(B)
        adapters.append(_adapter(recipe, a, A, E, B, stream))
    return Arrays(
        x=signs("x", (*batch, n), min(1.0, 4.0 / n)),
        dout=signs("dout", (*batch, m), min(1.0, 3.0 / m)),
        base=stream.choice("base", (*batch, m), (-2.0, -1.0, 1.0, 2.0)),
        base_dx=stream.choice("base_dx", (*batch, n), (-2.0, -1.0, 1.0, 2.0)),
        weight=weight,
        bias=stream.choice("bias", (m,), (-2.0, -1.0, 1.0, 2.0)),
        adapters=tuple(adapters),
    )


def _special_x(recipe: Recipe, x: F64) -> F64:
    """x where a family prescribes it."""
    if recipe.values == "identity":
        return np.eye(recipe.in_features)
    if recipe.values == "steep":
        return np.ones_like(x)
    if recipe.values == "swamped":
        # One more than the format's integers reach in steps of one: + 1 is lost, there.
        large = {"bfloat16": 2.0**8, "float16": 2.0**11, "float32": 2.0**24}[recipe.dtype]
        return np.array([[large, 1.0, 1.0, -large]])
    return x


def _quantisable(recipe: Recipe, stream: Stream, x: F64) -> F64:
    """x as activations whose int8 codes are not in doubt, exact in float16 as in the dtype.

    Elements near the middle of two codes are drawn again. Outlier columns hold outliers in all
    rows but the last, whose small number there goes with its column.
    """
    if recipe.kind not in ("int8-eval", "int8-outliers"):
        return round_to(x, recipe.dtype)
    rows = x.reshape(prod(recipe.batch), recipe.in_features)
    threshold = THRESHOLD if recipe.kind == "int8-outliers" else 0.0
    for attempt in range(1, ATTEMPTS):
        if threshold:
            signs = stream.choice("outliers", (len(rows), len(OUTLIERS)), (-9.5, 8.25, 17.0, -30.0))
            rows[:, OUTLIERS] = signs
            rows[-1, OUTLIERS[0]] = 0.25
        rows = round_to(round_to(rows, recipe.dtype), "float16")
        doubtful = ambiguous_codes(rows, threshold)
        if not doubtful.any():
            return rows.reshape(x.shape)
        rows = np.where(doubtful, stream.bell(f"x/{attempt}", rows.shape), rows)
    raise ValueError(f"{recipe.id}: no activations with codes beyond doubt in {ATTEMPTS} attempts.")

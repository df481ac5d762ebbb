"""The one door through which `reference` enters the suite: what y and the gradients must be."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch

from conformance.case import DType, as_float64
from conformance.exactness import Dyadic
from conformance.port import Port
from reference import (
    FORMATS,
    Adapter,
    Arithmetic,
    Bounded,
    Observed,
    bound_importance,
    bound_penalty,
    budget_range,
    dequantize_4bit,
    dequantize_absmax,
    most_important,
    observe,
    quantize_4bit,
    quantize_absmax,
    quantize_rows,
    unobserved,
)
from reference import backward as reference_backward
from reference import bounds as reference_bounds
from reference import forward as reference_forward
from reference import output as reference_output

__all__ = [
    "Adapter",
    "Arithmetic",
    "Bounded",
    "Gradients",
    "Observed",
    "arithmetic_for",
    "bound_importance",
    "bound_penalty",
    "budget_range",
    "exact_adapter",
    "exact_gradients",
    "exact_output",
    "exact_ranknum",
    "expected_gradients",
    "expected_output",
    "expected_output_from_weight",
    "gradients_in_domain",
    "in_domain",
    "most_important",
    "observe",
    "unobserved",
    "weight_4bit",
    "weight_8bit",
]

# fl32(2**k - 1e-5) + 1e-5 is 2**k in fp32 and in fp64 rounded to fp32, so c = alpha / 2**k is exact.
RANKNUM_EPSILON = 1e-5
# Tensor cores truncate: an accumulation step loses up to one unit in the last place, not half of it.
TRUNCATING_ACCUMULATOR = 2.0**-23


@dataclass(frozen=True)
class Gradients:
    """dx, and per adapter dA, dE, dB: each with its bound."""

    dx: Bounded
    dA: tuple[Bounded, ...]
    dE: tuple[Bounded, ...]
    dB: tuple[Bounded, ...]


def arithmetic_for(
    port: Port, dtype: DType, device: torch.device, compute: DType | None = None
) -> Arithmetic:
    """What the port may round for inputs of `dtype`: what it declared, or `compute` (autocast)."""
    strict = port.arithmetic == "float32" and compute is None
    chosen = Arithmetic.strict(dtype) if strict else Arithmetic.permissive(dtype)
    accumulator = chosen.accumulator
    if device.type == "cuda" and (compute or dtype) != "float32":
        accumulator = TRUNCATING_ACCUMULATOR
    return Arithmetic(
        io=chosen.io,
        compute=FORMATS[compute] if compute else chosen.compute,
        accumulator=accumulator,
    )


def expected_output(
    x: np.ndarray, adapters: Sequence[Adapter], base: torch.Tensor, arithmetic: Arithmetic
) -> Bounded:
    """y = base + sum of the updates, the base output taken as data."""
    return reference_bounds.bound_output(x, adapters, as_float64(base), arithmetic)


def expected_gradients(
    x: np.ndarray,
    adapters: Sequence[Adapter],
    dout: np.ndarray,
    base_dx: torch.Tensor | None,
    arithmetic: Arithmetic,
) -> Gradients:
    """The VJP of the contract, the base layer's own gradient of x taken as data."""
    given = None if base_dx is None else as_float64(base_dx)
    dx, per_adapter = reference_bounds.bound_gradients(x, adapters, dout, given, arithmetic)
    return Gradients(
        dx,
        tuple(g.dA for g in per_adapter),
        tuple(g.dE for g in per_adapter),
        tuple(g.dB for g in per_adapter),
    )


def in_domain(
    x: np.ndarray, adapters: Sequence[Adapter], base: torch.Tensor, arithmetic: Arithmetic
) -> bool:
    """Whether everything that a conforming implementation may store stays in the format's range."""
    return bool(reference_bounds.in_domain(x, adapters, as_float64(base), arithmetic))


def gradients_in_domain(
    x: np.ndarray,
    adapters: Sequence[Adapter],
    dout: np.ndarray,
    base_dx: torch.Tensor | None,
    arithmetic: Arithmetic,
) -> bool:
    """The same of the backward pass alone."""
    given = None if base_dx is None else as_float64(base_dx)
    return bool(reference_bounds.gradients_in_domain(x, adapters, dout, given, arithmetic))


def expected_output_from_weight(
    x: np.ndarray,
    weight: np.ndarray,
    bias: np.ndarray | None,
    adapters: Sequence[Adapter],
    arithmetic: Arithmetic,
) -> Bounded | None:
    """y from the dequantised weight (out, in): the base layer's roundings are bounded, too.

    None where a conforming implementation may leave the range of its format.
    """
    base = reference_bounds.bound_base_output(x, weight, bias, arithmetic)
    if not reference_bounds.in_domain(x, adapters, base.value, arithmetic):
        return None
    y = reference_bounds.bound_output(x, adapters, base.value, arithmetic)
    # y's own roundings are relative to a base output that may be off by its bound.
    return Bounded(y.value, y.bound + base.bound * (1.0 + 4.0 * arithmetic.io.roundoff))


def weight_4bit(
    weight: np.ndarray, quant_type: Literal["nf4", "fp4"], offset: float | None
) -> np.ndarray:
    """What 4-bit quantisation, by the reference's own code, makes of a weight (out, in).

    offset: the mean of the scales that double quantisation took off, as the base layer says it
        (a mean in fp32 depends on the order of its sum); None without double quantisation.
    """
    packed, absmax = quantize_4bit(weight.astype(np.float32), quant_type)
    if offset is not None:
        absmax = dequantize_absmax(quantize_absmax(absmax, np.float32(offset)))
    restored = dequantize_4bit(packed, absmax, weight.shape, quant_type)
    return np.asarray(restored, dtype=np.float64)


def weight_8bit(weight: np.ndarray) -> np.ndarray:
    """What row-wise int8 quantisation, by the reference's own code, makes of a weight (out, in)."""
    codes, scales = quantize_rows(weight.astype(np.float16))
    return codes.astype(np.float64) * (scales.astype(np.float64)[:, None] / 127.0)


def exact_output(
    x: np.ndarray, adapters: Sequence[Adapter], base: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor | None:
    """The bits of y on dyadic data, or None where `conformance.exactness` does not certify them."""
    exact_adapters = [exact_adapter(a) for a in adapters]
    given = as_float64(base)
    total = np.abs(given)
    for a in exact_adapters:
        total = total + reference_forward(np.abs(x), _magnitudes(a))[0]
    dyadic = _dyadic(exact_adapters)
    integers = [x, *(m for a in adapters for m in (a.A, a.B))]
    if not dyadic.applies(integers) or not dyadic.certifies(total, given, dtype):
        return None
    return torch.from_numpy(reference_output(given, x, exact_adapters)).to(dtype)


def exact_gradients(
    x: np.ndarray,
    adapter: Adapter,
    dout: np.ndarray,
    base_dx: torch.Tensor | None,
    dtype: torch.dtype,
) -> dict[str, torch.Tensor]:
    """The bits of dx, dA, dE and dB on dyadic data: those that `conformance.exactness` certifies."""
    a = exact_adapter(adapter)
    dyadic = _dyadic([a])
    if not dyadic.applies([x, dout, a.A, a.B]):
        return {}
    given = np.zeros_like(x) if base_dx is None else as_float64(base_dx)
    value = reference_backward(dout, reference_forward(x, a)[1])
    size = reference_backward(np.abs(dout), reference_forward(np.abs(x), _magnitudes(a))[1])
    exact: dict[str, torch.Tensor] = {}
    if dyadic.certifies(np.abs(given) + size.dx, given, dtype):
        exact["dx"] = torch.from_numpy(given + value.dx).to(dtype)
    for part in ("dA", "dE", "dB"):
        if dyadic.certifies(getattr(size, part), np.zeros(1), dtype):
            exact[part] = torch.from_numpy(getattr(value, part)).to(torch.float32)
    return exact


def _magnitudes(adapter: Adapter) -> Adapter:
    """The adapter whose every path counts positively."""
    return replace(
        adapter,
        A=np.abs(adapter.A),
        E=np.abs(adapter.E),
        B=np.abs(adapter.B),
        scaling=abs(adapter.scaling),
    )


def _dyadic(adapters: Sequence[Adapter]) -> Dyadic:
    return Dyadic(
        tuple(float(a.scaling) for a in adapters),
        tuple(float(a.ranknum) + RANKNUM_EPSILON for a in adapters),
        np.concatenate([np.zeros(0), *(a.E[:, 0] for a in adapters)]),
    )


def exact_ranknum(power: int) -> float:
    """The fp32 ranknum for which ranknum + 1e-5 is 2**power, in fp32 and in fp64 rounded to fp32."""
    target = np.float32(2.0**power)
    ranknum = np.float32(2.0**power - RANKNUM_EPSILON)
    if ranknum + np.float32(RANKNUM_EPSILON) != target:
        raise ValueError(f"2**{power} has no exact ranknum in fp32.")
    if np.float32(float(ranknum) + RANKNUM_EPSILON) != target:
        raise ValueError(f"2**{power} has no exact ranknum in fp64.")
    return float(ranknum)


def exact_adapter(adapter: Adapter) -> Adapter:
    """The adapter with its divisor made exactly the power of two that fp32 makes of it."""
    divisor = np.float32(adapter.ranknum) + np.float32(RANKNUM_EPSILON)
    return Adapter(
        adapter.A,
        adapter.E,
        adapter.B,
        scaling=adapter.scaling,
        ranknum=_inverse_of_epsilon(float(divisor)),
        keep=adapter.keep,
        p=adapter.p,
    )


def _inverse_of_epsilon(divisor: float) -> float:
    """The float64 r with r + 1e-5 == divisor; one of the neighbours of the difference is."""
    guess = divisor - RANKNUM_EPSILON
    for candidate in (guess, np.nextafter(guess, 0.0), np.nextafter(guess, np.inf)):
        if candidate + RANKNUM_EPSILON == divisor:
            return float(candidate)
    raise ValueError(f"No float64 ranknum gives the divisor {divisor!r}.")

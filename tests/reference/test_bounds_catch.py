"""Known faults exceed the bounds: what an implementation gets wrong cannot hide inside them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from numpy.typing import NDArray

from reference import (
    Adapter,
    AdapterGradients,
    Arithmetic,
    backward,
    bound_gradients,
    bound_output,
    forward,
    round_to,
)
from tests.reference.judging import ratio, worst

F64 = NDArray[np.float64]
Fault = Callable[[F64, Adapter], F64]
Grads = tuple[F64, ...]
GradientFault = Callable[[F64, Adapter, F64], Grads]


def layer(io: str, features: int = 32) -> tuple[F64, Adapter, F64]:
    """x (6, in), an adapter of rank 4 with signed E, and dy (6, 24)."""
    rng = np.random.default_rng(3)
    A, E, B = (rng.standard_normal(s) for s in ((4, features), (4, 1), (24, 4)))
    A, E, B = (round_to(m, "float32") for m in (A, E, B))
    x, dy = round_to(rng.standard_normal((6, features)), io), rng.standard_normal((6, 24))
    return x, Adapter(A, E, B, scaling=16.0, ranknum=6.0), round_to(dy, io)


def delta(x: F64, a: Adapter) -> F64:
    return forward(x, a)[0]


def spread(values: F64, size: float) -> F64:
    """The values with alternating relative errors of the given size."""
    signs = np.where(np.arange(values.size) % 2, 1.0, -1.0).reshape(values.shape)
    return values * (1.0 + size * signs)


FORWARD: dict[str, Fault] = {
    "forgets the scaling": lambda x, a: delta(x, replace(a, scaling=1.0)),
    "does not divide by ranknum": lambda x, a: delta(x, replace(a, ranknum=1.0)),
    "divides by the rank": lambda x, a: delta(x, replace(a, ranknum=4.0)),
    "divides twice": lambda x, a: delta(x, a) / 6.0,
    "takes sqrt(rank), as rank-stabilised LoRA does": lambda x, a: delta(x, a) * 6.0 / 2.0,
    "ignores E": lambda x, a: delta(x, replace(a, E=np.ones_like(a.E))),
    "squares E": lambda x, a: delta(x, replace(a, E=a.E**2)),
    "loses the sign of E": lambda x, a: delta(x, replace(a, E=np.abs(a.E))),
    "reverses E": lambda x, a: delta(x, replace(a, E=a.E[::-1])),
    "averages E over ranks": lambda x, a: delta(x, replace(a, E=np.full_like(a.E, a.E.mean()))),
    "drops the last rank": lambda x, a: delta(x, replace(a, E=a.E * [[1], [1], [1], [0]])),
    "drops the last input": lambda x, a: delta(x * (np.arange(x.shape[1]) < x.shape[1] - 1), a),
    "adds the delta twice": lambda x, a: 2.0 * delta(x, a),
    "subtracts it": lambda x, a: -delta(x, a),
    "adds nothing": lambda x, a: 0.0 * delta(x, a),
    "gives every row the first row's": lambda x, a: delta(x[:1], a) + np.zeros((6, 24)),
    "gives NaN": lambda x, a: delta(x, a) * np.nan,
}


@pytest.mark.parametrize("fault", FORWARD.values(), ids=list(FORWARD))
@pytest.mark.parametrize("io", ["float32", "bfloat16", "float16"])
def test_a_wrong_output_exceeds_the_bound(fault: Fault, io: str) -> None:
    """Even for a permissive arithmetic, and with a base output of the delta's size."""
    x, a, _ = layer(io)
    base = round_to(np.random.default_rng(1).standard_normal((6, 24)), io)

    expected = bound_output(x, [a], base, Arithmetic.permissive(io))
    assert ratio(round_to(base + delta(x, a), io), expected) <= 1.0
    assert ratio(round_to(base + fault(x, a), io), expected) > 1.0


def changed(**factors: float) -> GradientFault:
    """The true gradients, one of them multiplied."""

    def fault(x: F64, a: Adapter, dy: F64) -> Grads:
        true = backward(dy, forward(x, a)[1])
        return tuple(g * factors.get(name, 1.0) for name, g in zip(true._fields, true, strict=True))

    return fault


def of(x: F64, a: Adapter, dy: F64) -> AdapterGradients:
    return backward(dy, forward(x, a)[1])


GRADIENTS: dict[str, GradientFault] = {
    **{f"{name} is zero": changed(**{name: 0.0}) for name in AdapterGradients._fields},
    **{f"{name} has the wrong sign": changed(**{name: -1.0}) for name in AdapterGradients._fields},
    **{f"{name} is not divided": changed(**{name: 6.0}) for name in AdapterGradients._fields},
    "dA forgets E": lambda x, a, dy: of(x, a, dy)._replace(dA=of(x, a, dy).dA / a.E),
    "dB forgets E": lambda x, a, dy: of(x, a, dy)._replace(dB=of(x, a, dy).dB / a.E.T),
    "dx forgets E": lambda x, a, dy: (of(x, replace(a, E=a.E**0), dy).dx, *of(x, a, dy)[1:]),
    "dE carries E": lambda x, a, dy: of(x, a, dy)._replace(dE=of(x, a, dy).dE * a.E),
    "parameters see the first row only": lambda x, a, dy: (
        of(x, a, dy).dx,
        *of(x[:1], a, dy[:1])[1:],
    ),
    "one row is missing": lambda x, a, dy: (of(x, a, dy).dx, *of(x[1:], a, dy[1:])[1:]),
}


@pytest.mark.parametrize("fault", GRADIENTS.values(), ids=list(GRADIENTS))
@pytest.mark.parametrize("io", ["float32", "bfloat16", "float16"])
def test_a_wrong_gradient_exceeds_its_bound(fault: GradientFault, io: str) -> None:
    """For a permissive arithmetic, the true ones accepted."""
    x, a, dy = layer(io)

    dx, [leaf] = bound_gradients(x, [a], dy, None, Arithmetic.permissive(io))
    expected = (dx, leaf.dA, leaf.dE, leaf.dB)
    assert worst(zip(of(x, a, dy), expected, strict=True)) <= 1.0
    assert worst(zip(fault(x, a, dy), expected, strict=True)) > 1.0


@pytest.mark.parametrize(
    ("io", "features", "size"),
    [
        ("float32", 4, 1e-5),
        ("float32", 32, 1e-4),
        ("float32", 512, 1e-3),
        ("bfloat16", 32, 5e-2),
        ("float16", 32, 6e-3),
    ],
)
def test_a_relative_error_of_this_size_is_seen(io: str, features: int, size: float) -> None:
    """Strict arithmetic, ordinary data: an error far below what fixed tolerances allow."""
    x, a, dy = layer(io, features)
    arithmetic, base = Arithmetic.strict(io), np.zeros((6, 24))

    true = of(x, a, dy)
    _, [leaf] = bound_gradients(x, [a], dy, None, arithmetic)
    assert ratio(spread(delta(x, a), size), bound_output(x, [a], base, arithmetic)) > 1.0
    for name in ("dA", "dE", "dB"):
        assert ratio(spread(getattr(true, name), size), getattr(leaf, name)) > 1.0


@pytest.mark.parametrize("rank", [1, 2, 8])
def test_a_missing_offset_shows_on_a_probe(rank: int) -> None:
    """In float32, one-hot x on a zero base tells ranknum + 1e-5 from ranknum, at ranknum 8."""
    rng = np.random.default_rng(0)
    A, B = (round_to(rng.standard_normal(s), "float32") for s in ((rank, 64), (5, rank)))
    a = Adapter(A, np.eye(rank)[:, :1], B, scaling=16.0, ranknum=8.0)
    x = np.eye(64)[:3]

    expected = bound_output(x, [a], np.zeros((3, 5)), Arithmetic.strict("float32"))
    wrong = delta(x, a) * (8.0 + 1e-5) / 8.0
    assert ratio(round_to(wrong, "float32"), expected) > 1.0


def test_a_second_adapter_that_sees_a_rounded_x_is_seen() -> None:
    """x rounded to bfloat16 between adapters exceeds the float32 bound."""
    x, a, _ = layer("float32")
    base = np.zeros((6, 24))

    expected = bound_output(x, [a, a], base, Arithmetic.strict("float32"))
    leaked = delta(x, a) + delta(round_to(x, "bfloat16"), a)
    assert ratio(round_to(2 * delta(x, a), "float32"), expected) <= 1.0
    assert ratio(round_to(leaked, "float32"), expected) > 1.0

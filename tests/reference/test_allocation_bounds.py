"""The allocator's bounds: float32 meets them in every order of evaluation, and hardly anything else does."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from reference import (
    Bounded,
    Observed,
    bound_importance,
    bound_penalty,
    budget_range,
    observe,
    unobserved,
)

PARTS = ("A", "E", "B")
F32 = np.float32
Array = np.ndarray
Course = list[
    dict[str, tuple[Array, Array]]
]  # by step and part: weight and gradient, exact in float32
Betas = tuple[float, float]


def draw_course(seed: int, size: float = 1.0) -> tuple[Course, Betas]:
    """A few steps of one layer, of random shape, with gradients of many magnitudes."""
    rng = np.random.default_rng(seed)
    r, inner, outer = rng.integers(1, 5), rng.integers(1, 40), rng.integers(1, 40)
    shapes = {"A": (r, inner), "E": (r, 1), "B": (outer, r)}
    course = [
        {
            part: tuple(
                (size * rng.normal(size=shape) * np.exp(rng.normal(0, 3, shape))).astype(F32)
                for _ in range(2)
            )
            for part, shape in shapes.items()
        }
        for _ in range(rng.integers(1, 7))
    ]
    beta1, beta2 = rng.uniform(0.01, 0.99, 2)
    return course, (float(beta1), float(beta2))  # type: ignore[return-value]


def bounded(course: Course, betas: Betas) -> Bounded:
    seen: dict[str, Observed] = {p: unobserved(course[0][p][0].shape) for p in PARTS}
    for step in course:
        for part, (w, dw) in step.items():
            seen[part] = observe(seen[part], w.astype(float), dw.astype(float), *betas)
    return bound_importance(seen["A"], seen["E"], seen["B"])


# --- float32, in the orders that people write ------------------------------------------------------


def smooth(old: Array, new: Array, beta: float) -> Array:
    return F32(beta) * old + F32(1 - beta) * new


def smooth_in_float32(old: Array, new: Array, beta: float) -> Array:
    return F32(beta) * old + (F32(1) - F32(beta)) * new


def interpolate(old: Array, new: Array, beta: float) -> Array:
    return old + F32(1 - beta) * (new - old)


def mean(values: Array, axis: int) -> Array:
    return values.mean(axis=axis, dtype=F32)


def mean_backwards(values: Array, axis: int) -> Array:
    rows = np.flip(np.moveaxis(values, axis, 0), 0)
    total = np.zeros(rows.shape[1:], dtype=F32)
    for row in rows:
        total = total + row * (F32(1) / F32(len(rows)))
    return total


def sensitivity(w: Array, dw: Array) -> Array:
    return np.abs(w * dw)


def unscaled_first(w: Array, dw: Array) -> Array:
    """A gradient that arrives three times too large, and is divided before it is multiplied."""
    return np.abs(w * (dw * F32(4) / F32(4)))


PIPELINES: dict[str, tuple[Callable[..., Any], Callable[..., Any], Callable[..., Any]]] = {
    "plain": (sensitivity, smooth, mean),
    "complement in float32": (sensitivity, smooth_in_float32, mean_backwards),
    "interpolated, unscaled first": (unscaled_first, interpolate, mean),
    "interpolated, summed backwards": (sensitivity, interpolate, mean_backwards),
}


def evaluate(course: Course, betas: Betas, name: str) -> Array:
    """S (r,) in float32."""
    now_of, average, mean_of = PIPELINES[name]
    scores = {}
    for part in PARTS:
        m = u = np.zeros(course[0][part][0].shape, dtype=F32)
        for step in course:
            now = now_of(*step[part])
            m = average(m, now, betas[0])
            u = average(u, np.abs(now - m), betas[1])
        scores[part] = m * u
        assert scores[part].dtype == F32
    total: Array = scores["E"][:, 0] + mean_of(scores["A"], 1) + mean_of(scores["B"], 0)
    return total


def ratio(got: Array, expected: Bounded) -> float:
    """The largest error / bound."""
    error = np.abs(got.astype(np.float64) - expected.value)
    assert np.isfinite(error).all()
    with np.errstate(divide="ignore", invalid="ignore"):
        return float(np.where(error == 0, 0.0, error / expected.bound).max())


@pytest.mark.parametrize("name", PIPELINES)
@pytest.mark.parametrize("size", [1.0, 1e-9, 1e-19])
@given(seed=st.integers(0, 2**20))
def test_a_float32_importance_is_within_its_bound(name: str, size: float, seed: int) -> None:
    """Also where products leave float32's normal range."""
    course, betas = draw_course(seed, size)
    assert ratio(evaluate(course, betas, name), bounded(course, betas)) <= 1.0


def test_the_bound_of_an_importance_is_not_much_too_wide() -> None:
    worst = max(
        ratio(evaluate(*draw_course(seed), name), bounded(*draw_course(seed)))
        for seed in range(60)
        for name in PIPELINES
    )
    assert worst > 0.05


@pytest.mark.parametrize("which", [0, 1])
def test_a_decay_rate_that_is_off_by_a_thousandth_is_outside(which: int) -> None:
    caught = 0
    for seed in range(20):
        course, betas = draw_course(seed)
        wrong = tuple(b * (1.001 if i == which else 1.0) for i, b in enumerate(betas))
        got = evaluate(course, wrong, "plain")  # type: ignore[arg-type]
        caught += ratio(got, bounded(course, betas)) > 1.0
    assert caught >= 18  # after one step, some rates are the same factor everywhere


def test_nothing_observed_is_zero_exactly() -> None:
    value, bound = bound_importance(*(unobserved(s) for s in ((2, 3), (2, 1), (4, 2))))
    assert not value.any()
    assert bound.max() < 1e-40


# --- the budget ------------------------------------------------------------------------------------


@given(
    st.integers(0, 10**6), st.integers(0, 10**6), st.integers(0, 50), st.integers(1, 999), st.data()
)
def test_a_float64_budget_is_one_of_the_two(
    first: int, second: int, tinit: int, falling: int, data: st.DataObject
) -> None:
    initial, final = max(first, second), min(first, second)
    step = tinit + data.draw(st.integers(0, falling))
    least, largest = budget_range(
        step, initial=initial, final=final, tinit=tinit, tfinal=3, total_step=tinit + falling + 3
    )
    progress = (step - tinit) / falling
    got = int((initial - final) * (1 - progress) ** 3 + final) if step > tinit else initial

    assert final <= least <= got <= largest <= initial
    exact = (initial - final) * (1 - Fraction(step - tinit, falling)) ** 3 + final
    if least != largest:
        assert largest == least + 1
        assert abs(exact - largest) < 1e-8


def test_the_budget_is_one_number_unless_it_is_at_an_integer() -> None:
    """8 (1/2)^3 = 1 may be rounded to just below; 9 (1/2)^3 may not."""
    shared = {"final": 0, "tinit": 0, "tfinal": 0, "total_step": 2}
    assert budget_range(1, initial=8, **shared) == (0, 1)
    assert budget_range(1, initial=9, **shared) == (1, 1)


# --- the penalty -----------------------------------------------------------------------------------


def draw_factors(seed: int) -> list[Array]:
    """Factors from hardly any length to long ones, and one that is orthonormal to rounding."""
    rng = np.random.default_rng(seed)
    factors = [
        (rng.normal(size=(rng.integers(1, 6), rng.integers(1, 40))) * 10.0 ** rng.integers(-2, 2))
        for _ in range(rng.integers(1, 5))
    ]
    if seed % 2:
        factors.append(np.linalg.qr(rng.normal(size=(20, 3)))[0].T)
    return [f.astype(F32) for f in factors]


def gram_of(factor: Array) -> Array:
    gram: Array = factor @ factor.T - np.eye(len(factor), dtype=F32)
    return gram


def gram_backwards(factor: Array) -> Array:
    gram = -np.eye(len(factor), dtype=F32)
    for column in factor.T[::-1]:
        gram = gram + np.outer(column, column)
    return gram


@pytest.mark.parametrize("gram_by", [gram_of, gram_backwards])
@given(seed=st.integers(0, 2**20))
def test_a_float32_penalty_and_its_gradient_are_within_their_bounds(
    gram_by: Callable[[Array], Array], seed: int
) -> None:
    factors = draw_factors(seed)
    value, slopes = bound_penalty([f.astype(np.float64) for f in factors])

    total, count = F32(0), F32(len(factors))
    for factor, slope in zip(factors, slopes, strict=True):
        gram = gram_by(factor)
        norm = np.sqrt((gram * gram).sum(dtype=F32))
        total = total + norm
        dgram = gram / norm * (F32(1) / count)
        got = dgram @ factor + dgram.T @ factor
        assert got.dtype == F32
        assert ratio(got, slope) <= 1.0
    assert ratio(np.asarray(total / count), value) <= 1.0


@given(seed=st.integers(0, 2**20))
def test_the_penaltys_bounds_are_narrow(seed: int) -> None:
    """One part in ten thousand is outside, where the factors are not orthonormal."""
    factors = [f.astype(np.float64) for f in draw_factors(2 * seed)]
    value, slopes = bound_penalty(factors)

    assert value.bound < 1e-4 * value.value
    for slope in slopes:
        assert slope.bound.max() < 1e-4 * np.abs(slope.value).max()


def test_near_orthonormal_factors_have_no_promised_gradient_and_orthonormal_ones_none() -> None:
    near = np.eye(2, 5)
    near[0, 0] += 2.0**-24
    _, (slope, zero) = bound_penalty([near, np.eye(3, 7)])

    assert np.isinf(slope.bound).all()
    assert not zero.value.any()
    assert not zero.bound.any()

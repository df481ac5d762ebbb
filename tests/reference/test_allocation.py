"""The allocator's reference: its properties, and its gradient by complex step."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from reference import (
    Averages,
    budget,
    most_important,
    orthogonal_penalty,
    triplet_importance,
    update_averages,
)

COMPLEX_STEP = 1e-30


@given(
    st.integers(0, 200),
    st.integers(0, 200),
    st.integers(0, 9),
    st.integers(0, 9),
    st.integers(1, 30),
)
def test_the_budget_falls_from_the_initial_to_the_final_one(
    first: int, second: int, tinit: int, tfinal: int, falling: int
) -> None:
    initial, final = max(first, second), min(first, second)
    total_step = tinit + tfinal + falling
    course = [
        budget(s, initial=initial, final=final, tinit=tinit, tfinal=tfinal, total_step=total_step)
        for s in range(total_step + 1)
    ]

    assert course[: tinit + 1] == [initial] * (tinit + 1)
    assert course[total_step - tfinal :] == [final] * (tfinal + 1)
    assert course == sorted(course, reverse=True)


def test_the_budget_is_cubic() -> None:
    halfway = budget(50, initial=1008, final=8, tinit=0, tfinal=0, total_step=100)
    assert halfway == 8 + 1000 // 8


@given(
    st.lists(st.lists(st.integers(0, 3), min_size=0, max_size=5), min_size=1, max_size=5), st.data()
)
def test_exactly_the_budget_is_kept_and_nobody_better_is_left_out(
    scores: list[list[int]], data: st.DataObject
) -> None:
    arrays = [np.array(s, dtype=np.float64) for s in scores]
    count = data.draw(st.integers(0, sum(map(len, scores))))

    kept = np.concatenate(most_important(arrays, count))

    together = np.concatenate(arrays)
    assert kept.sum() == count
    if 0 < count < len(together):
        assert together[kept].min() >= together[~kept].max()
        tied = together == together[kept].min()
        assert list(kept[tied]) == sorted(kept[tied], reverse=True)  # earlier ones first


def test_a_steady_sensitivity_has_a_vanishing_uncertainty() -> None:
    averages = Averages(np.zeros((2, 3)), np.zeros((2, 3)))
    weight, gradient = np.full((2, 3), -2.0), np.full((2, 3), 0.5)
    for _ in range(400):
        averages = update_averages(averages, weight, gradient, 0.85, 0.85)

    np.testing.assert_allclose(averages.mean, 1.0, rtol=1e-12)  # a geometric series' limit
    assert averages.uncertainty.max() < 1e-12


def test_importance_means_over_a_row_of_a_and_a_column_of_b() -> None:
    def averages(values: object) -> Averages:
        return Averages(np.array(values, dtype=np.float64), np.array(2.0))

    scores = triplet_importance(
        averages([[1, 3], [0, 4]]), averages([[10], [20]]), averages([[1, 2], [1, 2], [4, 2]])
    )

    assert scores.tolist() == [2 * (10 + 2 + 2), 2 * (20 + 2 + 2)]


@pytest.mark.parametrize("shape", [(1, 1), (2, 5), (3, 3), (4, 2)])
def test_the_penaltys_gradient_by_complex_step(shape: tuple[int, int]) -> None:
    rng = np.random.default_rng(shape[0])
    factors = [rng.standard_normal(shape), rng.standard_normal((2, 4))]
    _, gradients = orthogonal_penalty(factors)

    for index in np.ndindex(shape):
        moved = factors[0].astype(np.complex128)
        moved[index] += 1j * COMPLEX_STEP
        gram = moved @ moved.T - np.eye(len(moved))
        slope = np.sqrt((gram * gram).sum()).imag / COMPLEX_STEP / len(factors)
        assert abs(slope - gradients[0][index]) < 1e-13 * (1 + abs(slope))


def test_orthonormal_factors_have_no_penalty_and_no_gradient() -> None:
    penalty, gradients = orthogonal_penalty([np.eye(3, 7)])
    assert penalty == 0.0
    assert not gradients[0].any()


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_the_dtype_that_goes_in_comes_out(dtype: type) -> None:
    one = np.ones((2, 3), dtype=dtype)
    averages = update_averages(Averages(one, one), one, one, 0.85, 0.85)
    scores = triplet_importance(averages, Averages(one[:, :1], one[:, :1]), Averages(one.T, one.T))

    assert {averages.mean.dtype, averages.uncertainty.dtype, scores.dtype} == {np.dtype(dtype)}
    assert orthogonal_penalty([one])[1][0].dtype == dtype

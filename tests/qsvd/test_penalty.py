"""The penalty's own derivative: right to the second order, and zero where there is nothing to push."""

from __future__ import annotations

import pytest
import torch

from qsvd._importance import all_finite
from qsvd._penalty import _mean_distance


def _distance(factor):
    return _mean_distance([factor], [])


def _bounds(factor):
    """How far two computations of ||D||, D = F F^T - I, and of its gradient may be apart, in the norm.

    F is (r, n). An element of F F^T is a sum of n products, one of D has one more rounding, and ||D||
    adds r^2 squares: together n + r^2 / 2 + 3 roundings of what is no larger than ||F||^2 + sqrt(r), in
    each computation. In the gradient, 2 D F / ||D||, those errors stand over ||D||, twice, and r + 4
    more roundings of D / ||D|| times F. First order in u, and half as much again for the rest.
    """
    r, n = factor.shape
    u = torch.finfo(factor.dtype).eps / 2
    F = factor.detach().double()
    size = F.square().sum() + r**0.5
    distance = torch.linalg.matrix_norm(F @ F.T - torch.eye(r).double())
    of_value = 1.5 * 2 * u * (n + r**2 / 2 + 3) * size
    relative = of_value / distance if r else 0.0
    return float(of_value), float(2 * F.norm() * (2 * relative + 1.5 * 2 * u * (r + 4)))


def _assert_alike(got, want, factor):
    """Distance and gradient (of F, or of F^T) within `_bounds`."""
    of_value, of_gradient = _bounds(factor)

    assert abs(got[0] - want[0]) <= of_value
    assert got[1].shape == want[1].shape
    assert (got[1] - want[1]).norm() <= of_gradient


SHAPES = [(1, 1), (1, 5), (3, 5), (5, 3), (0, 4)]


@pytest.mark.parametrize("shape", SHAPES)
def test_it_is_the_frobenius_norm_as_autograd_has_it(shape):
    factor = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    plain = torch.linalg.matrix_norm(factor @ factor.T - torch.eye(len(factor)).double())
    (want,) = torch.autograd.grad(plain, factor)
    distance = _distance(factor)
    (got,) = torch.autograd.grad(distance, factor)

    _assert_alike((distance, got), (plain, want), factor)


def test_first_and_second_derivatives_match_finite_differences():
    factor = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)

    assert torch.autograd.gradcheck(_distance, factor)
    assert torch.autograd.gradgradcheck(_distance, factor)


def test_an_orthonormal_factor_is_pushed_nowhere():
    factor = torch.eye(3, 5, requires_grad=True)
    distance = _distance(factor)
    distance.backward()

    assert distance == 0.0
    assert torch.equal(factor.grad, torch.zeros(3, 5))


def test_columns_have_the_gradient_of_rows_laid_out_as_the_parameter_is():
    B = torch.randn(5, 3, requires_grad=True)
    distance = _mean_distance([], [B])
    (got,) = torch.autograd.grad(distance, B)
    rows = B.T.detach().contiguous().requires_grad_(True)
    (want,) = torch.autograd.grad(_distance(rows), rows)

    assert got.is_contiguous()
    _assert_alike((distance, got), (_distance(rows), want.T), rows)


def test_torch_func_differentiates_it():
    factor = torch.randn(3, 5)
    want = factor.clone().requires_grad_(True)
    _distance(want).backward()

    torch.testing.assert_close(torch.func.grad(_distance)(factor), want.grad)


def test_finite_numbers_are_finite_even_if_their_sum_is_not():
    largest = torch.full((4,), torch.finfo(torch.float32).max)

    assert all_finite([torch.ones(3), largest, torch.empty(0, 2)])
    assert all_finite([])
    for bad in (float("nan"), float("inf"), -float("inf")):
        assert not all_finite([torch.ones(3), torch.tensor([1.0, bad]), largest])
    assert not all_finite([torch.tensor([float("inf"), -float("inf")])])


def test_every_factor_counts_once_whatever_its_rank():
    rows = [torch.randn(r, 5, dtype=torch.float64, requires_grad=True) for r in (3, 2, 3, 0)]
    columns = [torch.randn(4, r, dtype=torch.float64, requires_grad=True) for r in (3, 2, 3, 0)]
    grams = [F @ F.T for F in rows] + [F.T @ F for F in columns]
    plain = sum(torch.linalg.matrix_norm(G - torch.eye(len(G)).double()) for G in grams) / 8
    found = _mean_distance(rows, columns)

    factors = rows + [F.T for F in columns]
    bounds = [_bounds(F) for F in factors]
    # Both means add eight distances and divide: eight more roundings of each.
    u = torch.finfo(torch.float64).eps / 2
    assert abs(found - plain) <= sum(b for b, _ in bounds) / 8 + 2 * 8 * u * plain
    got, want = (torch.autograd.grad(y, rows + columns) for y in (found, plain))
    for (_, bound), a, b in zip(bounds, got, want, strict=True):
        assert a.shape == b.shape
        assert (a - b).norm() <= bound / 8

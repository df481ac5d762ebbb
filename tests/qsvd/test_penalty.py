"""The penalty's own derivative: right to the second order, and zero where there is nothing to push."""

from __future__ import annotations

import pytest
import torch

from qsvd._importance import all_finite
from qsvd._penalty import _mean_distance


def _distance(factor):
    return _mean_distance([factor], [])


SHAPES = [(1, 1), (1, 5), (3, 5), (5, 3), (0, 4)]


@pytest.mark.parametrize("shape", SHAPES)
def test_it_is_the_frobenius_norm_as_autograd_has_it(shape):
    factor = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    plain = torch.linalg.matrix_norm(factor @ factor.T - torch.eye(len(factor)).double())
    (want,) = torch.autograd.grad(plain, factor)
    distance = _distance(factor)
    (got,) = torch.autograd.grad(distance, factor)

    torch.testing.assert_close(distance, plain)
    torch.testing.assert_close(got, want)


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

    torch.testing.assert_close(distance, _distance(rows))
    assert got.is_contiguous()
    torch.testing.assert_close(got, want.T)


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

    torch.testing.assert_close(found, plain)
    torch.testing.assert_close(
        torch.autograd.grad(found, rows + columns), torch.autograd.grad(plain, rows + columns)
    )

"""Ranks that the allocator has masked (E = 0) are left out of the products, and nobody can tell."""

from __future__ import annotations

import pytest
import torch

from qsvd import _arithmetic
from tests.qsvd.build import (
    DTYPES,
    KINDS,
    PARAMETERS,
    assert_within,
    expected,
    layer,
    randomised,
    updated,
)

ROWS = 40
RANK = 12


def masked_layer(kind, live, **options):
    """A layer of rank 12 with all ranks but `live` masked."""
    adapted = randomised(layer(kind, RANK, lora_alpha=3, **options))
    dead = [i for i in range(RANK) if i not in live]
    with torch.no_grad():
        adapted.lora_E["default"][dead] = 0.0
    return adapted


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("live", [(), (7,), (0, 3, 11), tuple(range(9)), tuple(range(10))])
def test_values_and_gradients_are_those_of_all_ranks(kind, dtype, live):
    adapted = masked_layer(kind, live)
    x, dy = torch.randn(ROWS, 64).to(dtype), torch.randn(ROWS, 32).to(dtype)
    want = expected(adapted, x, dy)
    leaf = x.clone().requires_grad_(True)
    y = adapted(leaf)
    y.backward(dy)

    assert_within(y, want.y, want.y_bound)
    for name in PARAMETERS:
        value, bound = want.gradients[name]
        assert_within(getattr(adapted, name)["default"].grad, value, bound)
    masked = [i for i in range(RANK) if i not in live]
    assert adapted.lora_E["default"].grad[masked].all(), (
        "a masked triplet learns of its importance from dE"
    )


@pytest.mark.parametrize("frozen", [(p,) for p in PARAMETERS])
def test_whatever_is_frozen_the_rest_has_the_same_gradients(frozen):
    adapted = masked_layer("4bit", (2, 5))
    x, dy = torch.randn(ROWS, 64, requires_grad=True), torch.randn(ROWS, 32)
    adapted(x).backward(dy)
    everything = {name: getattr(adapted, name)["default"].grad for name in PARAMETERS}
    dx, x.grad = x.grad, None
    for name in PARAMETERS:
        getattr(adapted, name)["default"].grad = None
        getattr(adapted, name)["default"].requires_grad_(name not in frozen)
    adapted(x).backward(dy)

    assert torch.equal(x.grad, dx)
    for name in PARAMETERS:
        grad = getattr(adapted, name)["default"].grad
        assert grad is None if name in frozen else torch.equal(grad, everything[name])


def test_masked_ranks_are_left_out_of_the_products(monkeypatch):
    """What is multiplied with the rows has as many rows as ranks are alive, but for dE's sake."""
    ranks = []
    ranks_of = {
        "shrink": lambda data, S, *rest: len(S),
        "gather": lambda P, data, *rest: P.shape[1],
        "expand": lambda P, R, *rest: len(R),
    }

    def recorded(name, product):
        def call(*given):
            ranks.append((name, ranks_of[name](*given)))
            return product(*given)

        return call

    for name in ranks_of:
        monkeypatch.setattr(_arithmetic, name, recorded(name, getattr(_arithmetic, name)))
    adapted = masked_layer("4bit", (0, 3, 11))
    adapted(torch.randn(ROWS, 64, requires_grad=True)).sum().backward()

    y, dx = ("expand", 3), ("expand", 3)
    dB, dQ = ("gather", 3), ("gather", RANK)
    h, P = ("shrink", 3), ("shrink", RANK)
    assert sorted(ranks) == [y, dx, dB, dQ, h, P]


def test_second_derivatives_know_of_masked_ranks():
    """d2y / dA dE is not zero where E is."""
    E = torch.randn(RANK, 1).double()
    E[4:] = 0.0
    n = ROWS
    inputs = [torch.randn(n, 2), torch.randn(n, 3), torch.randn(RANK, 3), E, torch.randn(2, RANK)]
    inputs = [t.double().requires_grad_(i in (2, 3, 4)) for i, t in enumerate(inputs)]
    c = torch.tensor([0.7], dtype=torch.float64)

    assert torch.autograd.gradcheck(lambda *t: updated(*t, c), inputs)
    assert torch.autograd.gradgradcheck(lambda *t: updated(*t, c), inputs)


def test_a_mask_that_changes_between_forward_and_backward_is_noticed():
    adapted = masked_layer("4bit", (0, 3, 11))
    y = adapted(torch.randn(ROWS, 64))
    with torch.no_grad():
        adapted.lora_E["default"].fill_(1.0)

    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_a_singular_value_that_is_not_a_number_is_not_masked():
    adapted = masked_layer("4bit", (0, 3))
    with torch.no_grad():
        adapted.lora_E["default"][5] = float("nan")

    assert adapted(torch.randn(ROWS, 64)).isnan().all()

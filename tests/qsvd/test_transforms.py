"""Checkpointing, torch.func, copies and graphs that are kept see the same layer as everyone."""

from __future__ import annotations

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from qsvd._arithmetic import number
from tests.qsvd.build import KINDS, PARAMETERS, gradients, layer, randomised


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("rows", [7, 40])
def test_checkpointing_gives_the_same_bits(kind, reentrant, rows):
    adapted = randomised(layer(kind, lora_dropout=0.3))
    x, dy = torch.randn(rows, 64), torch.randn(rows, 32)
    torch.manual_seed(5)
    dx, want = gradients(adapted, x, dy)
    torch.manual_seed(5)
    x = x.requires_grad_(True)
    adapted.zero_grad()
    checkpoint(adapted, x, use_reentrant=reentrant).backward(dy)

    assert torch.equal(x.grad, dx)
    assert all(torch.equal(getattr(adapted, p)["default"].grad, want[p]) for p in PARAMETERS)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("rows", [7, 40])
def test_a_graph_that_is_kept_gives_the_same_gradients_again(kind, dropout, rows):
    adapted = randomised(layer(kind, lora_dropout=dropout))
    x, dy = torch.randn(rows, 64, requires_grad=True), torch.randn(rows, 32)
    y = adapted(x)
    inputs = [x, *(getattr(adapted, p)["default"] for p in PARAMETERS)]
    first = torch.autograd.grad(y, inputs, dy, retain_graph=True)
    again = torch.autograd.grad(y, inputs, dy)

    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need CUDA")
@pytest.mark.parametrize("kind", KINDS)
def test_a_cuda_graph_replays_forward_and_backward(kind):
    adapted = randomised(layer(kind)).cuda()
    x, dy = torch.randn(40, 64, device="cuda"), torch.randn(40, 32, device="cuda")
    dx, want = gradients(adapted, x, dy)
    adapted.zero_grad()
    replayed = torch.cuda.make_graphed_callables(adapted, (x.clone().requires_grad_(True),))
    leaf = x.clone().requires_grad_(True)
    replayed(leaf).backward(dy)

    torch.testing.assert_close(leaf.grad, dx)
    for p in PARAMETERS:
        torch.testing.assert_close(getattr(adapted, p)["default"].grad, want[p])


@pytest.mark.parametrize("kind", KINDS)
def test_functional_call_uses_the_parameters_it_is_given(kind):
    adapted = randomised(layer(kind))
    x = torch.randn(3, 64)
    other = {"lora_E.default": torch.zeros(4, 1)}

    assert torch.equal(torch.func.functional_call(adapted, other, (x,)), adapted.base_layer(x))


@pytest.mark.parametrize("rows", [3, 40])
def test_torch_func_differentiates_through_the_adapter(rows):
    adapted = randomised(layer("4bit"))
    x = torch.randn(rows, 64)
    E = adapted.lora_E["default"].detach().clone()

    def loss(E):
        return torch.func.functional_call(adapted, {"lora_E.default": E}, (x,)).sum()

    _, want = gradients(adapted, x, torch.ones(rows, 32))
    torch.testing.assert_close(torch.func.grad(loss)(E), want["lora_E"])


def test_a_number_is_looked_at_only_where_it_can_be():
    class Lazy(torch.Tensor):
        def item(self):
            raise AssertionError("Somebody looked.")

    cpu = torch.device("cpu")
    assert number(torch.tensor([3.0]), cpu) == 3.0
    assert isinstance(number(torch.tensor([3.0]).as_subclass(Lazy), cpu), torch.Tensor)
    tripled = torch.func.vmap(lambda n: 3 * number(n, cpu))(torch.ones(4, 1))
    assert tripled.tolist() == [[3.0]] * 4

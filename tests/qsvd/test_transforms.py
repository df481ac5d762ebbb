"""Checkpointing, compiling and torch.func see the same layer as everyone."""

from __future__ import annotations

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from tests.qsvd.build import DTYPES, KINDS, PARAMETERS, gradients, layer, randomised


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_gives_the_same_bits(kind, reentrant):
    adapted = randomised(layer(kind, lora_dropout=0.3))
    x, dy = torch.randn(7, 64), torch.randn(7, 32)
    torch.manual_seed(5)
    dx, want = gradients(adapted, x, dy)
    torch.manual_seed(5)
    x = x.requires_grad_(True)
    adapted.zero_grad()
    checkpoint(adapted, x, use_reentrant=reentrant).backward(dy)

    assert torch.equal(x.grad, dx)
    assert all(torch.equal(getattr(adapted, p)["default"].grad, want[p]) for p in PARAMETERS)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_compiled_without_graph_breaks_it_gives_the_same_bits(kind, dtype):
    adapted = randomised(layer(kind))
    compiled = torch.compile(adapted, fullgraph=True, backend="aot_eager")
    x, dy = torch.randn(7, 64).to(dtype), torch.randn(7, 32).to(dtype)
    dx, want = gradients(adapted, x, dy)
    adapted.zero_grad()
    x = x.requires_grad_(True)
    compiled(x).backward(dy)

    assert torch.equal(x.grad, dx)
    assert all(torch.equal(getattr(adapted, p)["default"].grad, want[p]) for p in PARAMETERS)


@pytest.mark.parametrize("kind", KINDS)
def test_functional_call_uses_the_parameters_it_is_given(kind):
    adapted = randomised(layer(kind))
    x = torch.randn(3, 64)
    other = {"lora_E.default": torch.zeros(4, 1)}

    assert torch.equal(torch.func.functional_call(adapted, other, (x,)), adapted.base_layer(x))


def test_torch_func_differentiates_through_the_adapter():
    adapted = randomised(layer("4bit"))
    x = torch.randn(3, 64)
    E = adapted.lora_E["default"].detach().clone()

    def loss(E):
        return torch.func.functional_call(adapted, {"lora_E.default": E}, (x,)).sum()

    _, want = gradients(adapted, x, torch.ones(3, 32))
    torch.testing.assert_close(torch.func.grad(loss)(E), want["lora_E"])

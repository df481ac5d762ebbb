"""What the base layer returns is written in place where nobody else can see it, and nowhere else."""

from __future__ import annotations

import functools

import bitsandbytes as bnb
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from qsvd import SVDLinear4bit, _arithmetic
from tests.qsvd.build import (
    DTYPES,
    KINDS,
    PARAMETERS,
    assert_within,
    base_layer,
    expected,
    gradients,
    layer,
    randomised,
)

ROWS = 40


def outputs_of_base(adapted, x):
    """The base layer's output and the layer's, and the former's values before the adapter."""
    seen = []
    call = adapted.call_base

    def call_base(*given):
        base = call(*given)
        seen.append((base, base.detach().clone()))
        return base

    adapted.call_base = call_base
    y = adapted(x)
    del adapted.call_base
    return *seen[0], y


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(ROWS,), (5, 8), (2, 4, 5)])
@pytest.mark.parametrize("grad", [True, False])
def test_the_update_is_added_in_place_whatever_the_shape(kind, dtype, shape, grad):
    adapted = randomised(layer(kind, r=3))
    x = torch.randn(*shape, 64).to(dtype).requires_grad_(True)
    with torch.set_grad_enabled(grad):
        base, before, y = outputs_of_base(adapted, x)

    assert y.data_ptr() == base.data_ptr()
    assert y.shape == (*shape, 32)
    assert not torch.equal(y.reshape(ROWS, 32), before)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("audience", [False, True])
@pytest.mark.parametrize("grad", [True, False])
def test_both_sums_are_products_in_place(kind, audience, grad, monkeypatch):
    """
    y and, where x has a gradient, dx; without an audience.
    """
    adapted = randomised(layer(kind, r=3))
    if audience:
        adapted.base_layer.register_forward_hook(lambda *_: None)
    written = []
    product = _arithmetic.expand

    def expand(P, R, dtype, onto=None, in_place=False, kept=None):
        assert onto is not None
        written.append(in_place)
        return product(P, R, dtype, onto, in_place, kept)

    monkeypatch.setattr(_arithmetic, "expand", expand)
    adapted(torch.randn(2, 20, 64, requires_grad=grad)).sum().backward()

    assert written == [not audience] * (1 + grad)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(ROWS,), (5, 8)])
@pytest.mark.parametrize("grad", [True, False])
def test_a_hook_of_the_base_layer_sees_x_as_it_was_given(kind, shape, grad):
    """
    And no gradient is computed for it where x has none.
    """
    adapted = randomised(layer(kind, r=3))
    seen = []
    adapted.base_layer.register_forward_hook(lambda module, args, y: seen.append((args[0], y)))
    x = torch.randn(*shape, 64, requires_grad=grad)
    y = adapted(x)
    (given, returned), *more = seen

    assert not more
    assert torch.equal(given, x)
    assert given.requires_grad == grad
    assert returned.shape == y.shape == (*shape, 32)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_bitsandbytes_needs_neither_its_output_nor_its_gradient_again(kind, dtype):
    """
    What the layers rely on: both are new, and nothing reads them later. Either is overwritten here
    behind autograd's back, which would otherwise notice.
    """
    base = base_layer(kind)
    x, dy = torch.randn(ROWS, 64).to(dtype).requires_grad_(True), torch.randn(ROWS, 32).to(dtype)
    y = base(x)
    (want,) = torch.autograd.grad(y, x, dy, retain_graph=True)
    inputs, gradient = (x.detach().clone(), dy.clone()), want.clone()
    y.data.fill_(float("nan"))
    want.fill_(float("nan"))

    (again,) = torch.autograd.grad(y, x, dy)

    assert not y._is_view()
    assert again.is_contiguous()
    assert torch.equal(again, gradient)
    assert torch.equal(x, inputs[0])
    assert torch.equal(dy, inputs[1])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("adapters", [1, 3])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_gradients_have_the_bits_of_those_of_a_base_layer_with_an_audience(
    kind, dtype, adapters, dropout
):
    adapted = layer(kind, r=3, lora_dropout=dropout)
    for i in range(1, adapters):
        adapted.update_layer(f"adapter{i}", 3, 3, dropout, True)
    adapted.set_adapter(list(adapted.lora_A))
    adapted = randomised(adapted)
    x, dy = torch.randn(4, 10, 64).to(dtype), torch.randn(4, 10, 32).to(dtype)
    found = []
    for hook in (None, lambda *_: None):
        handle = hook and adapted.base_layer.register_forward_hook(hook)
        adapted.zero_grad()
        torch.manual_seed(3)
        leaf = x.clone().requires_grad_(True)
        y = adapted(leaf)
        y.backward(dy)
        gradients_of = [p.grad for p in adapted.parameters() if p.grad is not None]
        found.append([y.detach(), leaf.grad, *gradients_of])
        if handle:
            handle.remove()

    assert len(found[0]) == 2 + 3 * adapters
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def captured(adapted, how):
    """What a hook of the base layer sees, kept beside a copy of its values at that time."""
    kept = []
    base = adapted.base_layer

    def keep(t):
        kept.append((t, t.detach().clone()))

    if how == "forward hook":
        base.register_forward_hook(lambda module, args, y: keep(y))
    elif how == "gradient of the input":
        base.register_forward_pre_hook(lambda module, args: args[0].register_hook(keep) and None)
    elif how == "backward pre-hook":
        base.register_full_backward_pre_hook(lambda module, dy: keep(dy[0]))
    elif how == "backward hook":
        base.register_full_backward_hook(lambda module, dx, dy: keep(dx[0]))
    elif how == "forward replaced":
        call = base.forward

        def forward(x):
            y = call(x)
            keep(y)
            return y

        base.forward = forward
    elif how == "hook of all modules":
        nn.modules.module.register_module_forward_hook(
            lambda module, args, y: keep(y) if module is base else None
        )
    return kept


@pytest.fixture
def no_global_hooks():
    yield
    nn.modules.module._global_forward_hooks.clear()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "how",
    [
        "forward hook",
        "gradient of the input",
        "backward hook",
        "backward pre-hook",
        "forward replaced",
        "hook of all modules",
    ],
)
def test_what_others_see_is_not_written(kind, how, no_global_hooks):
    adapted = randomised(layer(kind, r=3))
    kept = captured(adapted, how)
    x, dy = torch.randn(ROWS, 64), torch.randn(ROWS, 32)
    dx, found = gradients(adapted, x, dy)
    want = expected(adapted, x, dy)

    assert kept
    assert all(torch.equal(t, before) for t, before in kept)
    assert_within(dx, want.dx, want.dx_bound)
    for name in PARAMETERS:
        assert_within(found[name], *want.gradients[name])


def test_a_base_layer_of_ones_own_is_not_written():
    class Keeping(bnb.nn.Linear4bit):
        def forward(self, x):
            self.last = super().forward(x)
            return self.last

    base = base_layer("4bit")
    base.__class__ = Keeping
    adapted = randomised(SVDLinear4bit(base, "default", r=3))
    y = adapted(torch.randn(ROWS, 64))

    assert not SVDLinear4bit.is_private(base)
    assert SVDLinear4bit.is_private(base_layer("4bit"))
    assert not torch.equal(y, base.last)


def test_torchs_longer_way_to_apply_a_function_gives_the_same_bits(monkeypatch):
    adapted = randomised(layer("4bit", r=3))
    x, dy = torch.randn(ROWS, 64), torch.randn(ROWS, 32)
    dx, want = gradients(adapted, x, dy)
    adapted.zero_grad()
    monkeypatch.setattr(_arithmetic, "is_eager", lambda: False)
    again, found = gradients(adapted, x, dy)

    assert torch.equal(dx, again)
    assert all(torch.equal(found[name], want[name]) for name in PARAMETERS)


@pytest.mark.parametrize("kind", KINDS)
def test_a_selective_checkpoint_may_keep_what_the_base_layer_returns(kind):
    adapted = randomised(layer(kind, r=3))
    x, dy = torch.randn(ROWS, 64), torch.randn(ROWS, 32)
    dx, want = gradients(adapted, x, dy)
    adapted.zero_grad()
    kept = set()

    def policy(context, operation, *args, **kwargs):
        name = str(operation)
        product = "gemm" in name or "mm" in name
        kept.update({name} if product else ())
        return CheckpointPolicy.MUST_SAVE if product else CheckpointPolicy.PREFER_RECOMPUTE

    leaf = x.clone().requires_grad_(True)
    contexts = functools.partial(create_selective_checkpoint_contexts, policy)
    checkpoint(adapted, leaf, use_reentrant=False, context_fn=contexts).backward(dy)

    assert "aten.addmm.default" in kept
    assert torch.equal(leaf.grad, dx)
    assert all(
        torch.equal(getattr(adapted, name)["default"].grad, want[name]) for name in PARAMETERS
    )

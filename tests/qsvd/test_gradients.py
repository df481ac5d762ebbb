"""Gradients: right, in fp32, with nothing computed or kept that is not needed."""

from __future__ import annotations

import pytest
import torch

from qsvd._dropout import draw_mask
from tests.qsvd.build import (
    DTYPES,
    KINDS,
    PARAMETERS,
    assert_within,
    expected,
    gradients,
    layer,
    randomised,
    updated,
)


def autocast_output(module, x, dtype):
    with torch.autocast("cpu", dtype=dtype):
        return module(x)


# Few rows take ordinary operations, others the layer's own functions.
FEW_AND_MANY = pytest.mark.parametrize("rows", [7, 40])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 20, 37, 1100])
def test_every_gradient_is_right_and_sums_are_in_fp32(kind, dtype, rows, monkeypatch):
    """
    Blocks are of 16 rows, so that there are many where x is read in blocks; 1100 half-precision
    terms summed in half precision would be far outside.
    """
    monkeypatch.setattr("qsvd._products._BLOCK_ELEMENTS", 16 * 64)
    adapted = randomised(layer(kind, r=5, lora_alpha=3))
    x, dy = torch.randn(rows, 64).to(dtype), torch.randn(rows, 32).to(dtype)
    want = expected(adapted, x, dy)
    dx, found = gradients(adapted, x, dy)

    assert dx.dtype == dtype
    assert_within(dx, want.dx, want.dx_bound)
    for name in PARAMETERS:
        assert found[name].dtype == torch.float32
        assert_within(found[name], *want.gradients[name])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("autocast", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [1, 37, 1100])
def test_under_autocast_everything_is_right_and_sums_are_in_fp32(
    kind, dtype, autocast, rows, monkeypatch
):
    """
    An fp32 output or gradient is not rounded with what is added to it: neither bound has bf16's
    roundoff of it.
    """
    monkeypatch.setattr("qsvd._products._BLOCK_ELEMENTS", 16 * 64)
    adapted = randomised(layer(kind, r=5, lora_alpha=3))
    x, dy = torch.randn(rows, 64).to(dtype), torch.randn(rows, 32)
    dy = dy.to(autocast_output(adapted, x[:1], autocast).dtype)
    want = expected(adapted, x, dy, autocast=autocast)
    leaf = x.clone().requires_grad_(True)
    y = autocast_output(adapted, leaf, autocast)
    y.backward(dy)

    assert_within(y, want.y, want.y_bound)
    assert_within(leaf.grad, want.dx, want.dx_bound)
    for name in PARAMETERS:
        grad = getattr(adapted, name)["default"].grad
        assert grad.dtype == torch.float32
        assert_within(grad, *want.gradients[name])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("autocast", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("p", [0.0, 0.5])
@FEW_AND_MANY
def test_autocast_rounds_many_rows_of_x_and_dy_to_bf16_and_none_to_fp16(kind, autocast, p, rows):
    adapted = randomised(layer(kind, lora_dropout=p))
    x, dy = torch.randn(rows, 64), torch.randn(rows, 32)
    found = []
    for as_given in (True, False):
        adapted.zero_grad()
        torch.manual_seed(5)
        given = [t if as_given else t.to(autocast).float() for t in (x, dy)]
        y = autocast_output(adapted, given[0].requires_grad_(True), autocast)
        y.backward(given[1].to(y.dtype))
        found.append({q: getattr(adapted, q)["default"].grad for q in PARAMETERS})

    for name in PARAMETERS:
        assert torch.equal(*(f[name] for f in found)) == (autocast == torch.bfloat16 and rows > 32)


@pytest.mark.parametrize("kind", KINDS)
@FEW_AND_MANY
def test_a_new_adapter_has_a_gradient_in_its_singular_values_alone(kind, rows):
    _, found = gradients(layer(kind), torch.randn(rows, 64), torch.randn(rows, 32))

    assert not found["lora_A"].any()
    assert not found["lora_B"].any()
    assert found["lora_E"].all()


@pytest.mark.parametrize("kind", KINDS)
@FEW_AND_MANY
def test_a_masked_singular_value_keeps_its_own_gradient_only(kind, rows):
    adapted = randomised(layer(kind))
    with torch.no_grad():
        adapted.lora_E["default"][2] = 0.0
    _, found = gradients(adapted, torch.randn(rows, 64), torch.randn(rows, 32))

    assert not found["lora_A"][2].any()
    assert not found["lora_B"][:, 2].any()
    assert found["lora_E"].all()


def test_ranknum_gets_no_gradient_even_if_it_asks_for_one():
    adapted = randomised(layer("4bit"))
    adapted.ranknum["default"].requires_grad_(True)
    adapted(torch.randn(3, 64)).sum().backward()

    assert adapted.ranknum["default"].grad is None


@pytest.mark.parametrize("p", [0.0, 0.5])
@pytest.mark.parametrize("rows", [3, 40])
@pytest.mark.parametrize("private", [False, True])
@pytest.mark.parametrize("alone", [False, True])
def test_first_and_second_derivatives_match_finite_differences(p, rows, private, alone):
    bias, x = torch.randn(rows, 2).double(), torch.randn(rows, 6).double()
    A, E, B = torch.randn(2, 6).double(), torch.randn(2, 1).double(), torch.randn(2, 2).double()
    W = torch.randn(2, 6).double()
    inputs = [t.requires_grad_(True) for t in (bias, x, A, E, B)]
    c = torch.tensor([0.7], dtype=torch.float64)
    mask = draw_mask(p, x) if p else None

    def y(bias, x, *factors):
        def base(x):
            return bias.clone() if alone else bias + (x @ W.T).tanh()

        return updated(base, x, *factors, c, mask, private)

    assert torch.autograd.gradcheck(y, inputs)
    assert torch.autograd.gradgradcheck(y, inputs)


@pytest.mark.parametrize("frozen", [(), *[(p,) for p in PARAMETERS], PARAMETERS])
@FEW_AND_MANY
def test_frozen_parameters_get_no_gradient_and_the_others_theirs(frozen, rows):
    adapted = randomised(layer("4bit"))
    x, dy = torch.randn(rows, 64), torch.randn(rows, 32)
    dx, want = gradients(adapted, x, dy)
    adapted.zero_grad()
    for name in frozen:
        getattr(adapted, name)["default"].requires_grad_(False)
    x = x.requires_grad_(True)
    adapted(x).backward(dy)

    assert torch.equal(x.grad, dx)
    for name in PARAMETERS:
        found = getattr(adapted, name)["default"].grad
        assert found is None if name in frozen else torch.equal(found, want[name])


@pytest.mark.parametrize("kind", KINDS)
@FEW_AND_MANY
def test_an_input_without_gradient_still_trains_the_adapter(kind, rows):
    adapted = randomised(layer(kind))
    x, dy = torch.randn(rows, 64), torch.randn(rows, 32)
    _, want = gradients(adapted, x, dy)
    adapted.zero_grad()
    adapted(x).backward(dy)

    assert all(torch.equal(getattr(adapted, p)["default"].grad, want[p]) for p in PARAMETERS)


def test_without_grad_mode_the_output_requires_none():
    adapted = randomised(layer("4bit"))

    with torch.no_grad():
        assert not adapted(torch.randn(3, 64)).requires_grad


@pytest.mark.parametrize("dtype", [*DTYPES, "autocast"])
@pytest.mark.parametrize("width", [64, 128, 256])
def test_backward_keeps_the_input_and_beside_it_h_where_that_is_small(dtype, width):
    n = 4096
    autocast, dtype = dtype == "autocast", torch.float32 if dtype == "autocast" else dtype
    base, x = torch.randn(n, 32).to(dtype), torch.randn(n, width).to(dtype).requires_grad_(True)
    A, E, B = (torch.randn(s, requires_grad=True) for s in ((4, width), (4, 1), (32, 4)))
    kept: dict[int, int] = {}

    def pack(t):
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t)
    with hooks, torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        updated(base, x, A, E, B, 1.0)
    beside_x = sum(size for at, size in kept.items() if at != x.untyped_storage().data_ptr())
    parameters = 4 * (A.numel() + E.numel() + B.numel())

    h = n * 4 * (2 if autocast or dtype == torch.bfloat16 else 4)
    if dtype != torch.float32 and h > x.nbytes / 25:
        h = 0
    assert beside_x == h + parameters


def test_a_frozen_adapter_does_not_keep_the_input():
    x = torch.randn(512, 64, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape) or t, lambda t: t):
        updated(torch.randn(512, 32), x, torch.ones(4, 64), torch.ones(4, 1), torch.ones(32, 4),
                    torch.ones(1))  # fmt: skip

    assert x.shape not in kept


@pytest.mark.parametrize("kind", KINDS)
@FEW_AND_MANY
def test_the_output_may_be_written_in_place(kind, rows):
    adapted = randomised(layer(kind))
    x, dy = torch.randn(rows, 64), torch.randn(rows, 32)
    dx, want = gradients(adapted, x, dy)
    adapted.zero_grad()
    x = x.requires_grad_(True)
    y = adapted(x)
    y.mul_(1.0).add_(1.0)
    y.backward(dy)

    assert torch.equal(x.grad, dx)
    assert all(torch.equal(getattr(adapted, p)["default"].grad, want[p]) for p in PARAMETERS)


@pytest.mark.parametrize("kind", KINDS)
@FEW_AND_MANY
def test_dropout_uses_the_mask_of_its_forward_in_backward(kind, rows):
    """
    With a zero base weight the adapter alone passes a gradient, and only where x was kept.
    """
    adapted = randomised(layer(kind, lora_dropout=0.5))
    x = torch.ones(rows, 64, requires_grad=True)
    torch.manual_seed(5)
    kept = draw_mask(adapted.lora_dropout["default"].p, x).kept != 0
    torch.manual_seed(5)
    y = adapted(x)
    base = adapted.base_layer(x)
    update = torch.autograd.grad((y - base).sum(), x)[0]

    # y - base passes dy and -dy to the base layer, whose two gradients cancel exactly.
    assert torch.equal(update != 0, kept)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_backward_inside_autocast_has_the_bits_of_one_outside(kind, dtype):
    """
    Of few rows it has not: autocast rounds what ordinary operations do, there as everywhere.
    """
    adapted = randomised(layer(kind))
    x, dy = torch.randn(40, 64), torch.randn(40, 32)
    found = []
    for inside in (True, False):
        adapted.zero_grad()
        with torch.autocast("cpu", dtype=dtype):
            y = adapted(x)
            if inside:
                y.backward(dy.to(y.dtype))
        if not inside:
            y.backward(dy.to(y.dtype))
        found.append([getattr(adapted, p)["default"].grad.clone() for p in PARAMETERS])

    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))

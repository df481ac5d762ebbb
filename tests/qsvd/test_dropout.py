"""Dropout's mask in bits: what it keeps, what it costs, and when the module itself is called."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from qsvd._dropout import _packed, draw_mask, drop, unpacked
from tests.qsvd.build import (
    DTYPES,
    KINDS,
    PARAMETERS,
    U32,
    UNIT_ROUNDOFF,
    assert_within,
    expected,
    layer,
    randomised,
)


@pytest.mark.parametrize("shape", [(0, 5), (1, 1), (3, 5), (7, 64)])
def test_packing_loses_no_bit(shape):
    size = -(-math.prod(shape) // 8) * 8
    kept = torch.randint(0, 2, (size,), dtype=torch.uint8)

    assert torch.equal(unpacked(_packed(kept), *shape), kept[: math.prod(shape)].view(shape))


def test_every_byte_survives_packing():
    kept = (torch.arange(256)[:, None] >> torch.arange(8) & 1).to(torch.uint8)

    assert torch.equal(unpacked(_packed(kept.flatten()), 256, 8), kept)


@pytest.mark.parametrize("p", [0.01, 0.1, 0.5, 0.9])
def test_elements_are_kept_with_their_chance_in_every_place_of_a_byte(p):
    n = 100_000
    kept = draw_mask(p, torch.ones(n, 8)).kept.double().mean(0)

    # Seven standard deviations: a chance of 1e-11 for each of 8.
    assert (kept - (1 - p)).abs().max() < 7 * math.sqrt(p * (1 - p) / n)


@pytest.mark.parametrize("p", [2.0**-18, 1.0 - 2.0**-18])
def test_chances_that_a_quarter_of_a_word_is_too_coarse_for(p):
    for _ in range(8):
        dropped = 1.0 - draw_mask(p, torch.empty(64, 256)).kept.double().mean()
        assert abs(dropped - p) < 2e-3


@pytest.mark.parametrize("p", [0.0, 1.0])
def test_where_nothing_or_everything_is_dropped_nothing_is_drawn(p):
    x = torch.ones(2, 8)
    before = torch.get_rng_state()
    found, mask = drop(nn.Dropout(p), x)

    assert torch.equal(found, (1 - p) * x)
    assert mask is None
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [3, 37, 1100])
def test_with_a_mask_values_and_gradients_are_those_of_the_survivors_scaled(kind, dtype, rows):
    """
    With p = 1/2 the survivors are doubled exactly, so that the layer is the one without dropout
    at 2 x where x is kept, but for the base layer's share.
    """
    adapted = randomised(layer(kind, r=5, lora_alpha=3, lora_dropout=0.5))
    x, dy = torch.randn(rows, 64).to(dtype), torch.randn(rows, 32).to(dtype)
    torch.manual_seed(5)
    kept = draw_mask(0.5, x).kept
    want = expected(adapted, 2 * kept * x, dy)
    base_there = adapted.base_layer(2 * kept * x).double()
    torch.manual_seed(5)
    leaf = x.clone().requires_grad_(True)
    y = adapted(leaf)
    y.backward(dy)
    base = adapted.base_layer(x).double()

    # The bound of the doubled input's y, and the one rounding of this y.
    bound = want.y_bound + UNIT_ROUNDOFF[dtype] * y.double().abs() + U32 * base.abs()
    assert_within(y, want.y - base_there + base, bound)
    for name in PARAMETERS:
        value, bound = want.gradients[name]
        assert_within(getattr(adapted, name)["default"].grad, value, bound)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_backward_keeps_one_bit_for_each_element_and_h(dtype):
    adapted = randomised(layer("4bit", lora_dropout=0.1))
    x = torch.randn(512, 64).to(dtype).requires_grad_(True)
    sizes = {}

    def pack(t):
        sizes[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    own = {t.untyped_storage().data_ptr() for t in (x, *adapted.parameters())}
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        adapted.base_layer(x)
        of_base = set(sizes)
        sizes.clear()
        adapted(x)
    beside = sum(size for at, size in sizes.items() if at not in own | of_base)

    h = 512 * 4 * dtype.itemsize
    assert beside == 512 * 64 // 8 + h


HOOKS = (
    "register_forward_hook",
    "register_forward_pre_hook",
    "register_full_backward_hook",
    "register_full_backward_pre_hook",
)


@pytest.mark.parametrize("change", [*HOOKS, "subclass", "inplace", "replaced"])
def test_a_dropout_that_is_more_than_dropout_is_called(change):
    adapted = randomised(layer("4bit", lora_dropout=0.5))
    called = []
    module = adapted.lora_dropout["default"]
    if change in HOOKS:
        getattr(module, change)(lambda *_: called.append(1))
    elif change == "inplace":
        module.inplace = True
    else:
        kind = type("Other", (nn.Dropout if change == "subclass" else nn.Module,), {})
        kind.forward = lambda self, x: called.append(1) or x
        adapted.lora_dropout["default"] = kind()

    assert drop(adapted.lora_dropout["default"], torch.ones(2, 64))[1] is None
    called.clear()
    adapted(torch.randn(3, 64, requires_grad=change in HOOKS)).sum().backward()
    assert called or change == "inplace"


@pytest.mark.parametrize("hook", HOOKS[:2])
def test_hooks_of_a_dropout_that_drops_nothing_are_called(hook):
    adapted = randomised(layer("4bit", lora_dropout=0.0))
    called = []
    getattr(adapted.lora_dropout["default"], hook)(lambda *_: called.append(1))
    adapted(torch.randn(3, 64))
    assert called


def test_a_dropped_infinity_is_not_hidden():
    """
    inf * 0 is NaN in `nn.Dropout`, too.
    """
    adapted = randomised(layer("4bit", lora_dropout=0.5))
    x = torch.full((4, 64), float("inf"))

    assert adapted(x).isnan().all()

"""Where the adapters add nothing, y has the bits of the base output, which is never written."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.qsvd.build import DTYPES, KINDS, bits, layer, randomised

pytestmark = pytest.mark.parametrize("kind", KINDS)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("training", [True, False])
def test_a_new_adapter_leaves_every_bit_of_the_base_output(kind, dtype, training):
    adapted = layer(kind).train(training)
    x = torch.randn(9, 64, dtype=dtype)

    assert torch.equal(bits(adapted(x)), bits(adapted.base_layer(x)))


def test_rank_zero_returns_the_base_output_itself(kind):
    adapted = layer(kind, r=0)
    kept: list[Tensor] = []
    adapted.base_layer.register_forward_hook(lambda *call: kept.append(call[2]))

    assert adapted(torch.randn(9, 64)) is kept[0]


def test_disabled_adapters_leave_every_bit_of_the_base_output(kind):
    adapted = randomised(layer(kind))
    x = torch.randn(9, 64)
    before = adapted(x)
    adapted.enable_adapters(False)

    assert torch.equal(bits(adapted(x)), bits(adapted.base_layer(x)))
    adapted.enable_adapters(True)
    assert torch.equal(adapted(x), before)


def test_no_active_adapter_leaves_every_bit_of_the_base_output(kind):
    adapted = randomised(layer(kind))
    adapted.set_adapter([])
    x = torch.randn(9, 64)

    assert torch.equal(bits(adapted(x)), bits(adapted.base_layer(x)))


def test_neither_the_input_nor_the_base_output_is_written(kind):
    adapted = randomised(layer(kind))
    kept: list[Tensor] = []
    adapted.base_layer.register_forward_hook(lambda *call: kept.extend([call[2], call[2].clone()]))
    x = torch.randn(5, 64)
    before = x.clone()
    adapted(x)

    assert torch.equal(kept[0], kept[1])
    assert torch.equal(x, before)

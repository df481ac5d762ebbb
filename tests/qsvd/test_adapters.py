"""Adding, activating, training and resetting adapters, with PEFT's names for all of it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from tests.qsvd.build import KINDS, base_layer, layer, randomised

pytestmark = pytest.mark.parametrize("kind", KINDS)


def trained(adapted):
    """The names of the adapters whose A, E and B all require a gradient."""
    groups = (adapted.lora_A, adapted.lora_E, adapted.lora_B)
    names = [{n for n, p in group.items() if p.requires_grad} for group in groups]
    assert names[0] == names[1] == names[2]
    return names[0]


def test_the_attributes_are_pefts(kind):
    adapted = layer(kind, r=3, lora_alpha=5, lora_dropout=0.25)

    for parameters in (adapted.lora_A, adapted.lora_E, adapted.lora_B, adapted.ranknum):
        assert isinstance(parameters, nn.ParameterDict)
        assert list(parameters.keys()) == ["default"]
        assert parameters["default"].dtype == torch.float32
    assert adapted.lora_A["default"].shape == (3, 64)
    assert adapted.lora_E["default"].shape == (3, 1)
    assert adapted.lora_B["default"].shape == (32, 3)
    assert adapted.ranknum["default"].tolist() == [3.0]
    assert isinstance(adapted.lora_dropout, nn.ModuleDict)
    assert adapted.lora_dropout["default"].p == 0.25
    assert (adapted.r, adapted.lora_alpha, adapted.scaling) == (
        {"default": 3},
        {"default": 5},
        {"default": 5},
    )
    assert (adapted.in_features, adapted.out_features) == (64, 32)
    assert adapted.get_base_layer() is adapted.base_layer
    assert adapted.weight is adapted.base_layer.weight
    assert adapted.bias is adapted.base_layer.bias
    assert (adapted.active_adapters, adapted.active_adapter) == (["default"], "default")
    assert (adapted.disable_adapters, adapted.merged, adapted.merged_adapters) == (False, False, [])


def test_no_dropout_is_an_identity(kind):
    assert isinstance(layer(kind).lora_dropout["default"], nn.Identity)


@pytest.mark.parametrize(("alpha", "scaling"), [(3, 3), (0.5, 0.5), (0, 4.0), (-2, 4.0)])
def test_the_scaling_is_alpha_if_positive_and_else_the_rank(kind, alpha, scaling):
    assert layer(kind, r=4, lora_alpha=alpha).scaling["default"] == scaling


def test_numpys_integers_are_ranks(kind):
    assert type(layer(kind, r=np.int64(3)).r["default"]) is int


def test_init_lora_weights_true_is_small_noise_around_the_identity(kind):
    adapted = layer(kind, r=16, base=base_layer(kind, 256, 256))

    assert not adapted.lora_E["default"].any()
    for parameters in (adapted.lora_A, adapted.lora_B):
        values = parameters["default"].detach()
        # 4096 draws: the deviation's own deviation is 0.02 / sqrt(8192); six of them.
        assert abs(float(values.std()) - 0.02) < 6 * 0.02 / 8192**0.5
        assert abs(float(values.mean())) < 6 * 0.02 / 4096**0.5


def test_init_lora_weights_false_is_standard_normal_throughout(kind):
    adapted = layer(kind, r=16, base=base_layer(kind, 256, 256), init_lora_weights=False)

    assert adapted.lora_E["default"].all()
    for parameters in (adapted.lora_A, adapted.lora_B):
        assert abs(float(parameters["default"].detach().std()) - 1.0) < 6 / 8192**0.5


def test_reset_lora_parameters_makes_an_adapter_the_identity_again(kind):
    adapted = randomised(layer(kind))
    adapted.reset_lora_parameters("default")
    x = torch.randn(3, 64)

    assert torch.equal(adapted(x), adapted.base_layer(x))


def test_the_layer_takes_the_base_layers_mode(kind):
    assert layer(kind).training
    assert not layer(kind, base=base_layer(kind).eval()).training


def test_update_layer_has_the_constructors_defaults(kind):
    adapted = layer(kind)
    adapted.update_layer("other", 3)

    assert (adapted.lora_alpha["other"], adapted.scaling["other"]) == (1, 1)
    assert isinstance(adapted.lora_dropout["other"], nn.Identity)
    assert not adapted.lora_E["other"].any()


def test_torchs_default_dtype_does_not_choose_the_parameters_dtype(kind):
    base = base_layer(kind)
    torch.set_default_dtype(torch.float64)
    try:
        adapted = layer(kind, base=base)
    finally:
        torch.set_default_dtype(torch.float32)

    kept = (adapted.lora_A, adapted.lora_E, adapted.lora_B, adapted.ranknum)
    assert all(parameters["default"].dtype == torch.float32 for parameters in kept)


def test_update_layer_adds_an_adapter_without_activating_it(kind):
    adapted = randomised(layer(kind))
    before = {k: v.clone() for k, v in adapted.state_dict().items() if "default" in k}
    x = torch.randn(3, 64)
    y = adapted(x)
    adapted.update_layer("other", 7, lora_alpha=2, lora_dropout=0.5, init_lora_weights=False)

    assert adapted.active_adapters == ["default"]
    assert trained(adapted) == {"default"}
    assert torch.equal(adapted(x), y)
    assert all(torch.equal(adapted.state_dict()[k], v) for k, v in before.items())
    assert adapted.lora_A["other"].shape == (7, 64)
    assert adapted.ranknum["other"].item() == 7.0


def test_set_adapter_activates_and_trains_these_and_no_others(kind):
    adapted = layer(kind)
    adapted.update_layer("other", 2)
    adapted.update_layer("third", 2)
    adapted.set_adapter("other")
    assert (adapted.active_adapters, trained(adapted)) == (["other"], {"other"})
    adapted.set_adapter(["third", "default"])
    assert (adapted.active_adapters, trained(adapted)) == (
        ["third", "default"],
        {"third", "default"},
    )
    adapted.set_adapter([])
    assert (adapted.active_adapters, trained(adapted)) == ([], set())
    adapted.set_adapter("other", inference_mode=True)
    assert (adapted.active_adapters, trained(adapted)) == (["other"], set())


def test_disabling_freezes_and_enabling_trains_the_active_adapters(kind):
    adapted = layer(kind)
    adapted.update_layer("other", 2)
    adapted.enable_adapters(False)
    assert (adapted.disable_adapters, trained(adapted)) == (True, set())
    adapted.set_adapter("other")
    assert trained(adapted) == set()
    adapted.enable_adapters(True)
    assert (adapted.disable_adapters, trained(adapted)) == (False, {"other"})


def test_names_that_contain_one_another_are_independent(kind):
    adapted = layer(kind)
    for name in ("a", "ab", "default_a"):
        adapted.update_layer(name, 2, init_lora_weights=False)
    adapted.set_adapter("a")

    assert trained(adapted) == {"a"}
    adapted(torch.randn(3, 64)).sum().backward()
    assert {n for n, p in adapted.lora_A.items() if p.grad is not None} == {"a"}


def test_the_base_layer_and_ranknum_are_frozen(kind):
    adapted = layer(kind)
    adapted.set_adapter("default")
    adapted(torch.randn(3, 64)).sum().backward()
    frozen = {n for n, p in adapted.named_parameters() if not p.requires_grad}

    assert frozen == {"base_layer.weight", "base_layer.bias", "ranknum.default"}
    assert all(adapted.get_parameter(n).grad is None for n in frozen)


def test_active_adapters_is_a_copy(kind):
    adapted = layer(kind)
    adapted.active_adapters.append("nobody")

    assert adapted.active_adapters == ["default"]


def test_repr_names_the_adapters_and_says_which_are_off(kind):
    adapted = layer(kind, r=3, lora_alpha=5, lora_dropout=0.25)
    adapted.update_layer("other", 2)

    assert "64 -> 32" in repr(adapted)
    assert "default: r=3, lora_alpha=5, dropout=0.25\n" in repr(adapted)
    assert "other: r=2, lora_alpha=1, dropout=0.0 (off)" in repr(adapted)

"""Saving, loading, copying and moving: the state is PEFT's, and the adapters stay fp32."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from accelerate import init_empty_weights
from peft import AdaLoraConfig
from peft.tuners.adalora.layer import SVDLinear
from torch import nn

import qsvd
from tests.qsvd.build import KINDS, base_layer, layer, randomised, unquantised_base

pytestmark = pytest.mark.parametrize("kind", KINDS)


def torch_saved(module):
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def pickled(module):
    return pickle.loads(pickle.dumps(module))


def adapter_state(module):
    return {k: v for k, v in module.state_dict().items() if not k.startswith("base_layer.")}


def pefts(n_in=64, n_out=32, r=4):
    config = AdaLoraConfig(total_step=10, lora_dropout=0.0)
    return SVDLinear(nn.Linear(n_in, n_out), "default", config, r=r)


def test_the_keys_are_pefts_in_pefts_shapes(kind):
    ours, theirs = adapter_state(layer(kind)), adapter_state(pefts())

    assert {k: v.shape for k, v in ours.items()} == {k: v.shape for k, v in theirs.items()}
    assert set(ours) == {f"{p}.default" for p in ("lora_A", "lora_B", "lora_E", "ranknum")}
    assert "base_layer.weight" in layer(kind).state_dict()


def test_adapters_travel_to_peft_and_back(kind):
    ours, theirs, again = randomised(layer(kind)), pefts(), layer(kind)
    # Strict about everything but the base layer, whose kinds differ.
    there = theirs.load_state_dict(adapter_state(ours), strict=False)
    back = again.load_state_dict(adapter_state(theirs), strict=False)

    for keys in (*there, *back):
        assert all(k.startswith("base_layer.") for k in keys)
    for name, value in adapter_state(ours).items():
        assert torch.equal(adapter_state(again)[name], value)


@pytest.mark.parametrize("copied", [copy.deepcopy, pickled, torch_saved])
@pytest.mark.parametrize("ran", [False, True])
def test_a_copy_computes_the_same_and_shares_nothing(kind, copied, ran):
    adapted = randomised(layer(kind))
    x = torch.randn(3, 64)
    if ran:
        adapted(x)
    twin = copied(adapted)

    assert torch.equal(twin(x), adapted(x))
    ours = {p.data_ptr() for p in adapted.parameters()}
    assert ours.isdisjoint(p.data_ptr() for p in twin.parameters())
    assert [p.requires_grad for p in twin.parameters()] == [
        p.requires_grad for p in adapted.parameters()
    ]


def options(kind):
    """Base layers whose quantisation state is saved in different ways."""
    return {
        "4bit": [
            {"quant_type": "nf4", "compress_statistics": True},
            {"quant_type": "nf4", "compress_statistics": False},
            {"quant_type": "fp4", "bias": False},
        ],
        "8bit": [{}, {"bias": False}, {"threshold": 2.0}],
    }[kind]


@pytest.mark.parametrize("variant", [0, 1, 2])
@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("source_ran", [False, True])
@pytest.mark.parametrize("target", ["quantised", "ran", "unquantised"])
def test_its_own_state_dict_loads_into_a_fresh_layer(kind, variant, assign, source_ran, target):
    chosen = options(kind)[variant]
    source = randomised(layer(kind, base=base_layer(kind, **chosen)))
    x = torch.randn(3, 64)
    if source_ran:
        source(x)
    make = unquantised_base if target == "unquantised" else base_layer
    fresh = layer(kind, base=make(kind, **chosen))
    if target == "ran":
        fresh(x)
    fresh.load_state_dict(source.state_dict(), assign=assign)

    for mode in (True, False):
        assert torch.equal(fresh.train(mode)(x), source.train(mode)(x))
    saved, loaded = source.state_dict(), fresh.state_dict()
    assert saved.keys() == loaded.keys()
    assert all(torch.equal(saved[k], loaded[k]) for k in saved)
    assert {n: p.requires_grad for n, p in fresh.named_parameters()} == {
        n: p.requires_grad for n, p in source.named_parameters()
    }


def test_loading_copies_unless_told_to_assign(kind):
    source, fresh = randomised(layer(kind)), layer(kind)
    state = source.state_dict()
    fresh.load_state_dict(state)
    x = torch.randn(3, 64)
    y = fresh(x)
    for value in state.values():
        value.zero_()

    assert torch.equal(fresh(x), y)


def test_a_checkpoint_of_another_shape_is_refused(kind):
    other, fresh = layer(kind, base=base_layer(kind, 128, 32)), layer(kind)
    x = torch.randn(3, 64)
    y = fresh.base_layer(x)

    with pytest.raises(RuntimeError, match=r"quantised weight is \(32, 128\), .*\(32, 64\)"):
        fresh.load_state_dict({k: v for k, v in other.state_dict().items() if "bias" not in k})
    assert torch.equal(fresh.base_layer(x), y)


def test_a_layer_inside_a_model_loads_too(kind):
    source, fresh = (nn.Sequential(nn.Identity(), randomised(layer(kind))) for _ in range(2))
    x = torch.randn(3, 64)
    source(x)
    result = fresh.load_state_dict(source.state_dict(), strict=True)

    assert not result.missing_keys
    assert not result.unexpected_keys
    assert torch.equal(fresh(x), source(x))


def test_unknown_and_missing_keys_are_still_reported(kind):
    adapted = layer(kind)
    state = adapted.state_dict()
    state["lora_A.stranger"] = state.pop("lora_A.default")

    result = adapted.load_state_dict(state, strict=False)
    assert result.missing_keys == ["lora_A.default"]
    assert result.unexpected_keys == ["lora_A.stranger"]


def test_a_strict_load_refuses_an_unknown_key(kind):
    adapted = layer(kind)

    with pytest.raises(RuntimeError, match=r"Unexpected key.*stranger"):
        adapted.load_state_dict(adapted.state_dict() | {"stranger": torch.zeros(1)})


# After a forward `Linear8bitLt` has its own word for scales that do not come with a weight.
MISSING = {"4bit": r"Missing key.*base_layer\.weight", "8bit": "Loading a quantized checkpoint"}


def test_scales_without_a_weight_are_reported_and_not_loaded(kind):
    source, fresh = layer(kind), layer(kind)
    state = source.state_dict()
    del state["base_layer.weight"]
    x = torch.randn(3, 64)
    y = fresh.base_layer(x)

    with pytest.raises(RuntimeError, match=MISSING[kind]):
        fresh.load_state_dict({k: v for k, v in state.items() if "bias" not in k})
    assert torch.equal(fresh.base_layer(x), y)


def test_an_assigned_weight_saves_its_scales_before_the_layer_has_run(kind):
    source, fresh = layer(kind), layer(kind)
    fresh.load_state_dict(source.state_dict(), assign=True)

    assert type(fresh.base_layer.weight) is type(source.base_layer.weight)
    saved, loaded = source.state_dict(), fresh.state_dict()
    assert saved.keys() == loaded.keys()
    assert all(torch.equal(saved[k], loaded[k]) for k in saved)


@pytest.mark.parametrize(
    "cast",
    [
        lambda m: m.half(),
        lambda m: m.bfloat16(),
        lambda m: m.double(),
        lambda m: m.to(torch.bfloat16),
        lambda m: m.to("cpu", torch.float16),
    ],
)
def test_adapters_keep_their_fp32_values_when_the_model_is_cast(kind, cast):
    adapted = randomised(layer(kind))
    before = adapter_state(copy.deepcopy(adapted))
    cast(adapted)

    for name, value in adapter_state(adapted).items():
        assert value.dtype == torch.float32
        assert torch.equal(value, before[name])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_half_precision_model_runs_and_trains(kind, dtype):
    adapted = randomised(layer(kind)).to(dtype)
    x = torch.randn(3, 64, dtype=dtype)
    y = adapted(x)
    y.sum().backward()

    assert y.dtype == dtype
    assert adapted.lora_A["default"].grad.dtype == torch.float32


@pytest.mark.parametrize("assign", [False, True])
def test_a_half_precision_checkpoint_loads_into_fp32_adapters(kind, assign):
    source, fresh = randomised(layer(kind)), layer(kind)
    halves = {k: v.half() for k, v in adapter_state(source).items()}
    fresh.load_state_dict(halves, strict=False, assign=assign)

    for name, value in adapter_state(fresh).items():
        assert value.dtype == torch.float32
        assert torch.equal(value, halves[name].float())


@pytest.mark.parametrize("with_ranknum", [True, False])
def test_a_layer_built_on_meta_loads_and_knows_its_ranknum(kind, with_ranknum):
    """
    PEFT's adapter files have no ranknum.
    """
    source = randomised(layer(kind, r=3))
    with torch.device("meta"):
        base = unquantised_base(kind)
    fresh = qsvd.layer_for(base)(base, "default", r=3)
    assert fresh.lora_A["default"].is_meta
    assert fresh.ranknum["default"].tolist() == [3.0]
    state = source.state_dict()
    if not with_ranknum:
        del state["ranknum.default"]
    fresh.load_state_dict(state, strict=with_ranknum, assign=True)

    x = torch.randn(3, 64)
    assert torch.equal(fresh(x), source(x))
    assert fresh.ranknum["default"].tolist() == [3.0]
    assert not fresh.ranknum["default"].requires_grad


def test_to_empty_keeps_ranknum(kind):
    with torch.device("meta"):
        base = unquantised_base(kind)
        fresh = qsvd.layer_for(base)(base, "default", r=3)
    fresh.to_empty(device="cpu")

    assert not fresh.lora_A["default"].is_meta
    assert fresh.ranknum["default"].tolist() == [3.0]


def test_moving_the_adapters_to_meta_keeps_ranknum(kind):
    """
    bitsandbytes' weights do not move to meta: its layers raise.
    """
    adapted = layer(kind, r=3)
    for part in (adapted.lora_A, adapted.ranknum):
        part.to("meta")

    assert adapted.lora_A["default"].is_meta
    assert adapted.ranknum["default"].tolist() == [3.0]


def test_init_empty_weights_keeps_ranknum(kind):
    with init_empty_weights():
        base = unquantised_base(kind)
        fresh = qsvd.layer_for(base)(base, "default", r=3)

    assert fresh.lora_A["default"].is_meta
    assert fresh.ranknum["default"].tolist() == [3.0]


def test_a_changed_ranknum_survives_moving_and_saving(kind):
    source, fresh = layer(kind, r=4), layer(kind, r=4)
    source.ranknum["default"].data.fill_(2.5)
    source.to("cpu").half()
    fresh.load_state_dict(source.state_dict())

    assert fresh.ranknum["default"].tolist() == [2.5]

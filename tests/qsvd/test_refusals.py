"""What is refused, with a message that says what to do, and with nothing changed."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from bitsandbytes.nn import Linear4bit, Linear8bitLt, LinearFP4, LinearNF4
from torch import nn

import qsvd
from tests.qsvd.build import KINDS, base_layer, layer, randomised

CLASSES = {"4bit": qsvd.SVDLinear4bit, "8bit": qsvd.SVDLinear8bitLt}

BAD_SETTINGS = [
    ({"r": -1}, ValueError, "`r` must be 0 or more, got -1"),
    ({"r": 2.5}, TypeError, "`r` must be an integer, got 2.5"),
    ({"r": 4.0}, TypeError, "`r` must be an integer"),
    ({"r": "8"}, TypeError, "`r` must be an integer"),
    ({"r": True}, TypeError, "`r` must be an integer, got True"),
    ({"r": None}, TypeError, "`r` must be an integer"),
    ({"lora_alpha": math.nan}, ValueError, "`lora_alpha` must be finite"),
    ({"lora_alpha": math.inf}, ValueError, "`lora_alpha` must be finite"),
    ({"lora_alpha": "8"}, TypeError, "`lora_alpha` must be a number"),
    ({"lora_alpha": True}, TypeError, "`lora_alpha` must be a number"),
    ({"lora_dropout": 1.0}, ValueError, r"`lora_dropout` must be in \[0, 1\)"),
    ({"lora_dropout": -0.1}, ValueError, r"`lora_dropout` must be in \[0, 1\)"),
    ({"lora_dropout": math.nan}, ValueError, r"`lora_dropout` must be in \[0, 1\)"),
    ({"lora_dropout": None}, TypeError, "`lora_dropout` must be a number"),
    ({"init_lora_weights": "pissa"}, ValueError, "`init_lora_weights` must be True or False"),
    ({"init_lora_weights": "gaussian"}, ValueError, "`init_lora_weights` must be True or False"),
]
BAD_NAMES = [
    ("", ValueError, "empty"),
    ("a.b", ValueError, "has a dot.*'a_b'"),
    (3, TypeError, "must be a string"),
    (None, TypeError, "must be a string"),
    *[
        (name, ValueError, "cannot be a key")
        for name in ("keys", "items", "values", "pop", "update", "training", "_keys", "type")
    ],
]
BAD_KEYWORDS = [
    ("use_rslora", True, "`use_rslora=True` is not supported"),
    ("use_dora", True, "`use_dora=True` is not supported"),
    ("inference_mode", True, "`inference_mode=True` is not supported"),
    ("config", object(), "`config` is not taken: pass `r`, `lora_alpha`"),
    ("lora_alhpa", 3, "Unknown keyword `lora_alhpa`. Did you mean `lora_alpha`"),
    ("zzz", 3, "Unknown keyword `zzz`. Known: r, lora_alpha"),
]


def snapshot(module):
    """All that a refusal must leave as it was: parameters, flags, plain attributes, random state."""
    return (
        {k: v.clone() for k, v in module.state_dict().items()},
        {k: (v.requires_grad, v.dtype) for k, v in module.named_parameters()},
        {k: copy.copy(v) for k, v in vars(module).items() if isinstance(v, (bool, dict, list))},
        torch.get_rng_state(),
    )


def assert_unchanged(module, before):
    values, flags, attributes, rng = before
    now = snapshot(module)
    assert now[0].keys() == values.keys()
    assert all(torch.equal(now[0][k], v) for k, v in values.items())
    assert now[1] == flags
    assert now[2].keys() == attributes.keys()
    plain = {k for k in attributes if not k.startswith("_")} | {"_active_adapters"}
    assert all(now[2][k] == attributes[k] for k in plain & attributes.keys())
    assert torch.equal(now[3], rng)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("setting", "error", "message"), BAD_SETTINGS)
def test_a_bad_number_is_refused_by_the_constructor(kind, setting, error, message):
    base = base_layer(kind)
    before = snapshot(base)

    with pytest.raises(error, match=message):
        CLASSES[kind](base, "default", **{"r": 4, **setting})
    assert_unchanged(base, before)


@pytest.mark.parametrize(("setting", "error", "message"), BAD_SETTINGS)
def test_a_bad_number_is_refused_by_update_layer(setting, error, message):
    adapted = layer("4bit")
    before = snapshot(adapted)

    with pytest.raises(error, match=message):
        adapted.update_layer("other", **{"r": 4, **setting})
    assert_unchanged(adapted, before)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("name", "error", "message"), BAD_NAMES)
def test_a_bad_name_is_refused_by_the_constructor(kind, name, error, message):
    base = base_layer(kind)
    before = snapshot(base)

    with pytest.raises(error, match=message):
        CLASSES[kind](base, name, r=4)
    assert_unchanged(base, before)


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [*BAD_NAMES, ("default", ValueError, "already an adapter 'default'")],
)
def test_a_bad_or_taken_name_is_refused_by_update_layer(name, error, message):
    adapted = layer("4bit")
    before = snapshot(adapted)

    with pytest.raises(error, match=message):
        adapted.update_layer(name, 4)
    assert_unchanged(adapted, before)


@pytest.mark.parametrize("names", ["nobody", ["default", "nobody"], "", ["default", "default"]])
def test_set_adapter_refuses_unknown_and_repeated_names(names):
    adapted = layer("4bit")
    adapted.update_layer("other", 2)
    before = snapshot(adapted)

    with pytest.raises(ValueError, match=r"Adapters: \['default', 'other'\]|active once"):
        adapted.set_adapter(names)
    assert_unchanged(adapted, before)


def test_reset_lora_parameters_refuses_an_unknown_name():
    with pytest.raises(ValueError, match="No adapter 'nobody'"):
        layer("4bit").reset_lora_parameters("nobody")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("key", "value", "message"), BAD_KEYWORDS)
def test_keywords_that_ask_for_something_else_are_refused(kind, key, value, message):
    base = base_layer(kind)
    before = snapshot(base)

    with pytest.raises(TypeError, match=message):
        CLASSES[kind](base, "default", r=4, **{key: value})
    assert_unchanged(base, before)


@pytest.mark.parametrize("kind", KINDS)
def test_keywords_that_describe_the_base_layer_are_accepted(kind):
    described = {"threshold": 0.0, "quant_type": "nf4", "loaded_in_4bit": True, "use_dora": False}

    assert CLASSES[kind](base_layer(kind), "default", r=4, **described).r == {"default": 4}


def test_an_accepted_keyword_hides_no_other():
    with pytest.raises(TypeError, match="Unknown keyword `lora_alhpa`"):
        qsvd.SVDLinear4bit(base_layer("4bit"), "default", r=4, threshold=0.0, lora_alhpa=3)


def _dense():
    return nn.Linear(64, 32)


def _fp16_weights():
    return Linear8bitLt(64, 32, has_fp16_weights=True)


@pytest.mark.parametrize(
    ("cls", "make_base", "message"),
    [
        (qsvd.SVDLinear4bit, _dense, "wraps a bitsandbytes.nn.Linear4bit, got a torch.nn"),
        (qsvd.SVDLinear8bitLt, _dense, "wraps a bitsandbytes.nn.Linear8bitLt, got a torch.nn"),
        (qsvd.SVDLinear4bit, lambda: base_layer("8bit"), "got a bitsandbytes.*Linear8bitLt"),
        (qsvd.SVDLinear8bitLt, lambda: base_layer("4bit"), "got a bitsandbytes.*Linear4bit"),
        (qsvd.SVDLinear8bitLt, _fp16_weights, "`has_fp16_weights=False`"),
        (qsvd.SVDLinear4bit, lambda: layer("4bit"), "already: add an adapter to it with"),
        (qsvd.SVDLinear8bitLt, lambda: layer("8bit"), "already: add an adapter to it with"),
        (qsvd.SVDLinear4bit, lambda: None, "got a builtins.NoneType"),
    ],
)
def test_a_base_layer_of_another_kind_is_a_type_error(cls, make_base, message):
    base = make_base()
    before = snapshot(base) if base is not None else None

    with pytest.raises(TypeError, match=message):
        cls(base, "default", r=4)
    if base is not None:
        assert_unchanged(base, before)


@pytest.mark.parametrize(
    ("base_type", "cls"),
    [
        (Linear4bit, qsvd.SVDLinear4bit),
        (LinearNF4, qsvd.SVDLinear4bit),
        (LinearFP4, qsvd.SVDLinear4bit),
        (Linear8bitLt, qsvd.SVDLinear8bitLt),
    ],
)
def test_layer_for_gives_the_class_of_a_base_layer(base_type, cls):
    assert qsvd.layer_for(base_type(64, 32)) is cls


@pytest.mark.parametrize("other", [nn.Linear(4, 4), nn.Identity(), None])
def test_layer_for_names_what_it_supports(other):
    with pytest.raises(TypeError, match=r"Supported: bitsandbytes.nn.Linear4bit, .*Linear8bitLt"):
        qsvd.layer_for(other)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "refused",
    [
        lambda adapted: adapted.merge(),
        lambda adapted: adapted.merge(safe_merge=True),
        lambda adapted: adapted.merge(adapter_names=["default"]),
        lambda adapted: adapted.unmerge(),
    ],
)
def test_merging_is_refused_with_a_reason_and_a_remedy(kind, refused):
    adapted = randomised(layer(kind))
    x = torch.randn(3, 64)
    y, before = adapted(x), snapshot(adapted)

    with pytest.raises(NotImplementedError, match=r"quantised.*Keep the adapters beside it"):
        refused(adapted)
    assert_unchanged(adapted, before)
    assert adapted.merged is False
    assert torch.equal(adapted(x), y)

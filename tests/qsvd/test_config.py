"""AdaLoraConfig: PEFT's fields and defaults, checked at construction, read from and written as PEFT's."""

from __future__ import annotations

import copy
import dataclasses
import json
import pickle
import warnings
from pathlib import Path
from typing import Any

import pytest

from qsvd import AdaLoraConfig


def test_it_has_pefts_defaults() -> None:
    from peft import AdaLoraConfig as PeftConfig

    ours, theirs = AdaLoraConfig(total_step=10), PeftConfig(total_step=10)
    for field in dataclasses.fields(ours):
        assert getattr(ours, field.name) == getattr(theirs, field.name), field.name


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"total_step": None}, "`total_step` is needed"),
        ({"total_step": 0}, "must be less than `total_step`, got 0 \\+ 0 >= 0"),
        ({"total_step": -1}, "`total_step` must be 0 or more, got -1"),
        ({"tinit": 6, "tfinal": 4}, "got 6 \\+ 4 >= 10"),
        ({"target_r": 13}, "`target_r` must not exceed `init_r`, got 13 > 12"),
        ({"init_r": -1}, "`init_r` must be 0 or more, got -1"),
        ({"deltaT": 0}, "`deltaT` must be 1 or more, got 0"),
        ({"beta1": 0.0}, "`beta1` must be between 0 and 1, got 0.0"),
        ({"beta2": 1.0}, "`beta2` must be between 0 and 1, got 1.0"),
        ({"beta2": float("nan")}, "`beta2` must be between 0 and 1, got nan"),
        ({"orth_reg_weight": -0.5}, "`orth_reg_weight` must be finite and not negative, got -0.5"),
        ({"lora_dropout": 1.0}, "`lora_dropout` must be in \\[0, 1\\), got 1.0"),
        ({"lora_alpha": float("inf")}, "`lora_alpha` must be finite"),
        ({"init_lora_weights": "pissa"}, "`init_lora_weights` must be True or False"),
        ({"target_modules": "q", "layers_to_transform": 1}, "goes with a list"),
        ({"target_modules": ["q"], "layers_pattern": "layers"}, "says nothing without"),
    ],
)
def test_it_refuses_values_out_of_range(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AdaLoraConfig(**{"total_step": 10, **given})


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"totalstep": 5}, "Unknown field `totalstep`. Did you mean `total_step`?"),
        ({"xyzzy": 5}, "Unknown field `xyzzy`. Known: target_modules"),
        ({"use_dora": True}, "`use_dora=True` is not offered"),
        ({"init_r": 2.5}, "`init_r` must be an integer, got 2.5"),
        ({"init_r": True}, "`init_r` must be an integer, got True"),
        ({"beta1": "0.9"}, "`beta1` must be a number"),
        ({"target_modules": [1]}, "`target_modules` must be a string or strings"),
        ({"layers_to_transform": "1"}, "`layers_to_transform`"),
    ],
)
def test_it_refuses_other_fields_and_types(given: dict[str, Any], message: str) -> None:
    with pytest.raises(TypeError) as refused:
        AdaLoraConfig(**{"total_step": 10, **given})
    assert message in str(refused.value)


def test_it_is_a_value() -> None:
    config = AdaLoraConfig(total_step=10, target_modules={"v", "q"})
    assert config.target_modules == ("q", "v")
    for same in (copy.deepcopy(config), pickle.loads(pickle.dumps(config))):
        assert same == config
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.init_r = 3  # type: ignore[misc]


def test_it_reads_what_peft_writes(tmp_path: Path) -> None:
    from peft import AdaLoraConfig as PeftConfig

    theirs = PeftConfig(
        total_step=50, tinit=5, tfinal=5, init_r=6, target_r=3, lora_alpha=16, target_modules=["q"]
    )
    theirs.rank_pattern = {"layers.0.q.lora_E": [True, False]}
    theirs.save_pretrained(tmp_path)

    ours = AdaLoraConfig.from_pretrained(tmp_path)

    assert (ours.tinit, ours.tfinal, ours.init_r, ours.target_r) == (5, 5, 6, 3)
    assert ours.target_modules == ("q",)
    assert ours.rank_pattern == theirs.rank_pattern


def test_peft_reads_what_it_writes(tmp_path: Path) -> None:
    from peft import AdaLoraConfig as PeftConfig

    ours = AdaLoraConfig(
        total_step=50,
        beta1=0.9,
        target_modules=["q", "v"],
        exclude_modules=["head"],
        init_r=6,
        target_r=6,
    )
    (tmp_path / "adapter_config.json").write_text(json.dumps(ours.to_dict()))

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        theirs = PeftConfig.from_pretrained(str(tmp_path))

    assert (theirs.total_step, theirs.beta1, theirs.init_r) == (50, 0.9, 6)
    assert theirs.target_modules == {"q", "v"}
    assert theirs.exclude_modules == {"head"}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not JSON"),
        ("[]", "holds a list; expected an object"),
        ('{"peft_type": "LORA", "total_step": 5}', "`peft_type` is 'LORA': expected 'ADALORA'"),
        ('{"total_step": 5, "use_dora": true}', "`use_dora=True` is not offered"),
        ('{"total_step": 5, "totl_step": 5}', "Did you mean `total_step`?"),
        ('{"total_step": 5, "beta1": 2}', "`beta1` must be between 0 and 1"),
    ],
)
def test_a_file_that_is_no_configuration_is_refused_by_its_name(
    content: str, message: str, tmp_path: Path
) -> None:
    path = tmp_path / "adapter_config.json"
    path.write_text(content)
    with pytest.raises(ValueError) as refused:
        AdaLoraConfig.from_pretrained(tmp_path)
    assert message in str(refused.value)
    assert str(path) in str(refused.value)


def test_fields_of_newer_releases_that_say_nothing_are_left_out() -> None:
    config = AdaLoraConfig.from_dict({"total_step": 5, "use_something_new": False, "other": None})
    assert config == AdaLoraConfig(total_step=5)

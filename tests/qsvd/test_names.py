"""Adapters called as parts of module paths and of parameter names are: found exactly, in files too."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import qsvd
from qsvd import RankAllocator
from qsvd.integrations.peft import accelerate
from tests.qsvd.build import KINDS, Kind
from tests.qsvd.models import Stack, stack
from tests.qsvd.test_checkpoint import WEIGHTS, assert_same_output, config, peft_model, x

# Of `base_model.model.layers.0.q_proj.lora_E.<name>`, whole words, parts of them, and of our own state.
NAMES = ("layers", "q_proj", "q", "0", "lora_E", "lora", "E", "base_model", "base_layer", "ranknum")
# PEFT's allocator takes `ranknum.lora_E` for a factor, and crashes.
PEFTS = [name for name in NAMES if "lora_" not in name]


def trained(name: str) -> tuple[Stack, RankAllocator]:
    """An adapted model with random triplets, half of them masked."""
    settings = config()
    model = qsvd.adapt(stack(depth=2), settings, name)
    allocator = RankAllocator(model, settings, name)
    allocate(model, allocator, name)
    return model, allocator


def allocate(model: nn.Module, allocator: RankAllocator, name: str) -> None:
    for layer in qsvd.adapted_layers(model).values():
        for parameters in (layer.lora_A, layer.lora_E, layer.lora_B):
            parameters[name].grad = torch.randn_like(parameters[name])
    allocator.step(0)
    allocator.step(10)


def state(model: nn.Module, name: str) -> dict[str, Tensor]:
    """The adapter's triplets."""
    return {
        f"{path}.{part}": getattr(layer, part)[name].detach().clone()
        for path, layer in qsvd.adapted_layers(model).items()
        for part in ("lora_A", "lora_E", "lora_B")
    }


@pytest.mark.parametrize("name", NAMES)
def test_an_adapter_of_any_name_is_saved_and_loaded(name: str, tmp_path: Path) -> None:
    """
    Its name is not in the file, and loading it elsewhere, or beside another, gives the same numbers.
    """
    model, allocator = trained(name)
    qsvd.save_adapter(model, tmp_path, name)

    saved = load_file(tmp_path / WEIGHTS)
    assert saved.keys() == {f"base_model.model.{key}" for key in state(model, name)}
    for key, value in state(model, name).items():
        path, _, part = key.rpartition(".")
        keep = torch.tensor(allocator.rank_pattern[f"{path}.lora_E"])
        kept = value[:, keep] if part == "lora_B" else value[keep]
        assert torch.equal(saved[f"base_model.model.{key}"], kept)

    alone = qsvd.load_adapter(stack(depth=2), tmp_path, name)
    assert_same_output(alone, model)
    beside, _ = trained("default")
    before = state(beside, "default")
    qsvd.load_adapter(beside, tmp_path, name)
    assert_same_output(beside, model)
    for loaded in (alone, beside):
        for key, value in state(loaded, name).items():
            assert torch.equal(value, saved[f"base_model.model.{key}"])
    assert all(torch.equal(value, before[key]) for key, value in state(beside, "default").items())


def test_names_within_one_another_are_allocated_apart() -> None:
    """
    An allocation for `q` masks nothing of `q_proj` and of `E`.
    """
    names = ("q", "q_proj", "E")
    settings = config()
    model = qsvd.adapt(stack(depth=2), settings, names[0])
    for name in names[1:]:
        for layer in qsvd.adapted_layers(model).values():
            layer.update_layer(name, 4, 6, init_lora_weights=False)
    others = {name: state(model, name) for name in names[1:]}

    allocate(model, RankAllocator(model, settings, "q"), "q")

    alive = {name: count_alive(state(model, name)) for name in names}
    assert alive == {"q": 8, "q_proj": 16, "E": 16}
    for name, before in others.items():
        assert all(torch.equal(value, before[key]) for key, value in state(model, name).items())


def count_alive(triplets: dict[str, Tensor]) -> int:
    return sum(int(v.count_nonzero()) for key, v in triplets.items() if key.endswith("lora_E"))


@pytest.mark.parametrize("name", PEFTS)
@pytest.mark.parametrize("kind", KINDS)
def test_an_accelerated_peft_adapter_of_any_name_is_the_same(
    kind: Kind, name: str, tmp_path: Path
) -> None:
    """
    Outputs, gradients, PEFT's allocation and its file; PEFT itself cannot save a pruned one.
    """
    theirs = peft_model(kind, config(), adapter_name=name)
    ours = accelerate(copy.deepcopy(theirs))

    theirs.save_pretrained(str(tmp_path / "theirs"))
    ours.save_pretrained(str(tmp_path / "ours"))
    files = [load_file(tmp_path / which / name / WEIGHTS) for which in ("theirs", "ours")]
    assert files[0].keys() == files[1].keys()
    assert all(torch.equal(files[0][key], files[1][key]) for key in files[0])
    assert_same_output(qsvd.load_adapter(stack(kind, depth=2), tmp_path / "ours" / name), ours)

    for model in (theirs, ours):
        model(x()).square().mean().backward()
        model.base_model.update_and_allocate(5)
    assert_same_output(ours, theirs)
    expected = dict(theirs.named_parameters())
    for key, weight in ours.named_parameters():
        assert (weight.grad is None) == (expected[key].grad is None), key
        if weight.grad is not None:
            off = (weight.grad - expected[key].grad).abs().max()
            assert off <= 2048 * 2.0**-24 * expected[key].grad.abs().max(), key


def test_a_layer_without_the_active_adapter_is_the_base_layer() -> None:
    """
    In PEFT two adapters may be of different layers; `q` is not taken for `q_proj`.
    """
    theirs = peft_model("4bit", config(), adapter_name="q_proj")
    only_v = copy.deepcopy(theirs.peft_config["q_proj"])
    only_v.target_modules, only_v.inference_mode = {"v_proj"}, True
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs.add_adapter("q", only_v)
    ours: Any = accelerate(copy.deepcopy(theirs))

    outputs = []
    for name in ("q_proj", "q"):
        for model in (theirs, ours):
            model.set_adapter(name)
        assert_same_output(ours, theirs)
        outputs.append(ours(x()))
    assert not torch.allclose(*outputs, atol=1e-3)

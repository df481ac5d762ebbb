"""`accelerate` keeps a PEFT model what it is: same parameters, training and files, and back again."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import qsvd
from qsvd.integrations.peft import accelerate, restore
from tests.qsvd.build import KINDS, Kind
from tests.qsvd.models import WIDTH, stack
from tests.qsvd.test_checkpoint import assert_same_output, config, peft_model, x

# A step of training: roundings of fp32 along a model of three blocks.
SAME = 2.0**-24 * 4096


def train(model: Any, steps: int = 3) -> list[float]:
    """Optimizer steps of PEFT's own recipe; the losses."""
    optimizer = torch.optim.SGD((p for p in model.parameters() if p.requires_grad), lr=0.1)
    losses = []
    for step in range(1, steps + 1):
        loss = model(x()).square().mean()
        loss.backward()
        optimizer.step()
        model.base_model.update_and_allocate(step)
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("kind", KINDS)
def test_parameters_are_the_same_objects(kind: Kind) -> None:
    model = peft_model(kind, config())
    before = {name: id(p) for name, p in model.named_parameters()}

    assert accelerate(model) is model

    assert {name: id(p) for name, p in model.named_parameters()} == before
    assert sum(type(m).__name__.startswith("Accelerated") for m in model.modules()) == 4


@pytest.mark.parametrize("kind", KINDS)
def test_it_trains_as_before(kind: Kind) -> None:
    theirs = peft_model(kind, config())
    ours = accelerate(copy.deepcopy(theirs))

    for one, two in zip(train(theirs), train(ours), strict=True):
        assert abs(one - two) <= SAME * abs(one)

    assert_same_output(ours, theirs)


@pytest.mark.parametrize("kind", KINDS)
def test_the_update_is_added_in_place_here_too(kind: Kind, monkeypatch: pytest.MonkeyPatch) -> None:
    model = accelerate(peft_model(kind, config()))
    adapted = next(m for m in model.modules() if type(m).__name__.startswith("Accelerated"))
    seen = []
    call = adapted.arithmetic.call_base

    def call_base(*given: Any) -> torch.Tensor:
        seen.append(call(*given))
        return seen[-1]

    monkeypatch.setattr(adapted.arithmetic, "call_base", call_base)
    y = adapted(torch.randn(5, 8, WIDTH, requires_grad=True))

    assert y.shape[:2] == (5, 8)
    assert y.data_ptr() == seen[0].data_ptr()


def test_its_files_are_pefts_and_ours(tmp_path: Path) -> None:
    model = accelerate(peft_model("4bit", config()))
    train(model)
    model.base_model.peft_config["default"].rank_pattern = None
    model.save_pretrained(str(tmp_path))

    assert_same_output(model, peft_model("4bit", folder=tmp_path))
    assert_same_output(model, qsvd.load_adapter(stack(depth=2), tmp_path))


@pytest.mark.parametrize("kind", KINDS)
def test_half_precision_stays_half(kind: Kind) -> None:
    model = peft_model(kind, config())
    layer = next(m for m in model.modules() if type(m).__name__.startswith("SVDLinear"))
    half = torch.randn(3, WIDTH, dtype=torch.bfloat16)
    accelerate(model)
    assert layer(half).dtype == torch.bfloat16


def test_adapters_can_be_disabled_and_enabled() -> None:
    model = peft_model("4bit", config())
    plain = stack(depth=2)(x())
    accelerate(model)
    adapted = model(x())
    with model.disable_adapter():
        assert torch.equal(model(x()), plain)
    assert torch.equal(model(x()), adapted)


def test_restore_gives_pefts_forward_back() -> None:
    model = peft_model("4bit", config())
    before = model(x())
    classes = [type(m) for m in model.modules()]

    assert restore(accelerate(accelerate(model))) is model

    assert [type(m) for m in model.modules()] == classes
    assert torch.equal(model(x()), before)


def test_a_model_without_such_layers_is_refused() -> None:
    with pytest.raises(ValueError, match="no AdaLoRA layer of PEFT's"):
        accelerate(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="not accelerated"):
        restore(peft_model("4bit", config()))

"""Ports that compute nothing, or not by themselves, are found out: judged here, without a process each."""

from __future__ import annotations

import io
import random
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from conformance.chapters import test_of as decider_of
from conformance.judge import Answer, judge
from conformance.port import Port, load_port
from conformance.profile import QUICK
from conformance.settings import Settings
from conformance.trial import Trial
from conformance.worker import Worker

HOSTILE = Path(__file__).with_name("hostile")


@pytest.fixture(autouse=True)
def as_it_was() -> Iterator[None]:
    """What these ports do to this process's generators is theirs alone."""
    state = random.getstate()
    with torch.random.fork_rng(devices=[]):
        yield
    random.setstate(state)


def asked(port: Port, identifier: str, seed: int = 0, examples: int = 2) -> Answer:
    profile = replace(QUICK, max_examples=examples)
    return judge(decider_of(identifier), Trial(port=port, kind="4bit", profile=profile, seed=seed))


@pytest.mark.parametrize(
    ("identifier", "found"),
    [
        ("ENV-1", "torch's default dtype was torch.float32 and is torch.float64; NumPy's error"),
        ("ENV-2", "forward draws from Python's generator, or seeds it"),
        ("ENV-3", "Loading the port replaced torch.allclose."),
        ("ENV-5", "Loading the port imported reference."),
    ],
)
def test_tampering_has_a_clause_for_each_kind(identifier: str, found: str) -> None:
    answer = asked(load_port(str(HOSTILE / "tampers.py")), identifier)
    assert answer.status == "fail"
    assert found in answer.message


def test_what_loading_a_port_changed_is_put_back() -> None:
    before = torch.allclose
    port = load_port(str(HOSTILE / "tampers.py"))
    assert port.replaced_by_loading == ("torch.allclose",)
    assert torch.allclose is before
    assert torch.get_default_dtype() is torch.float32


@pytest.mark.parametrize("identifier", ["FWD-1", "FWD-2", "GRAD-1", "ENV-4"])
def test_a_tensor_that_agrees_with_everything_is_no_result(identifier: str) -> None:
    answer = asked(load_port(str(HOSTILE / "lazy.py")), identifier)
    assert answer.status == "fail"
    assert "y is a Agreeable, expected a plain torch.Tensor" in answer.message


@pytest.mark.parametrize(
    ("identifier", "found"),
    [
        ("RANK-5", "returns the budget 0, expected 12"),
        ("RANK-20", "the penalty is a Agreeable, expected a plain torch.Tensor"),
    ],
)
def test_an_allocator_that_agrees_with_everything_has_decided_nothing(
    identifier: str, found: str
) -> None:
    answer = asked(load_port(str(HOSTILE / "allocates_nothing.py")), identifier)
    assert answer.status == "fail"
    assert found in answer.message


def test_singular_values_that_agree_with_everything_are_none() -> None:
    """
    With a budget that is a number, what is looked at is E.
    """
    port = load_port(str(HOSTILE / "allocates_nothing.py"))
    allocator: Any = sys.modules["conformance_port_allocates_nothing"].RankAllocator
    honest_step = allocator.step
    allocator.step = lambda *given: 4 if honest_step(*given) is not None else 0
    answer = asked(port, "RANK-10")
    assert answer.status == "fail"
    assert "layers.0.lora_E is a AgreeableParameter" in answer.message


def test_a_penalty_that_replaces_a_function_fails_its_clause_and_is_put_back() -> None:
    before = torch.allclose
    answer = asked(load_port(str(HOSTILE / "dies_allocating.py")), "RANK-22")
    assert answer.status == "fail"
    assert "torch.allclose" in answer.message
    assert torch.allclose is before


def test_a_port_that_asks_the_reference_gets_none_and_is_told_of() -> None:
    """
    Its results are right: that it asked fails the clause.
    """
    spec = str(HOSTILE / "reaches.py")
    port = load_port(spec)
    settings = Settings(spec=spec, device="cpu", profile=replace(QUICK, max_examples=2))
    worker = Worker(io.StringIO(settings.to_json() + "\n"), io.StringIO())
    worker.watch = lambda: None  # type: ignore[method-assign]  # no alarm in this process
    with worker.wire:
        answer = worker.answer(port, {"clause": "FWD-1", "kind": "4bit"})

    assert asked(port, "FWD-1").status == "pass"
    assert answer["status"] == "fail"
    assert "The port imported reference" in answer["message"]


def test_a_reach_at_call_time_has_a_clause() -> None:
    answer = asked(load_port(str(HOSTILE / "reaches.py")), "ENV-5")
    assert answer.status == "fail"
    assert "forward imported reference" in answer.message


def test_answers_learnt_by_heart_are_of_no_use_under_another_seed() -> None:
    port = load_port(str(HOSTILE / "memorises.py"))
    layer: Any = sys.modules["conformance_port_memorises"].SVDLinear4bit
    assert asked(port, "FWD-1", seed=1, examples=8).status == "pass"
    layer.learning = False

    assert asked(port, "FWD-1", seed=1, examples=8).status == "pass"
    failed = asked(port, "FWD-1", seed=2, examples=8)
    assert failed.status == "fail"
    assert "y[" in failed.message

"""A port loads by name or by path, and one that cannot says what to do."""

from __future__ import annotations

import types
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from conformance.chapters import test_of as decider_of
from conformance.clauses import clauses
from conformance.judge import Answer, judge
from conformance.port import Port, PortError, load_port, port_from_module
from conformance.profile import QUICK
from conformance.trial import Trial
from conformance.verdict import Outcome, PortVerdict
from tests.mutants.honest import SVDLinear4bit
from tests.mutants.honest_allocator import HonestAllocator, HonestConfig, HonestPenalty


def test_a_dotted_name_loads() -> None:
    port = load_port("conformance.ports.peft")
    assert port.provides("4bit")
    assert port.provides("8bit")
    assert port.arithmetic == "float32"


def test_a_file_loads_and_may_provide_one_layer(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text("__version__ = '3.1'\ndef SVDLinear4bit(*args, **kwargs): ...\n")
    port = load_port(str(file))
    assert (port.name, port.version) == ("mine", "3.1")
    assert port.provides("4bit")
    assert not port.provides("8bit")


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("no_such_module_anywhere", "does not import: ModuleNotFoundError"),
        ("no/such/file.py", "is not a file"),
        ("json", "has neither `SVDLinear4bit` nor `SVDLinear8bitLt`"),
    ],
)
def test_a_port_that_cannot_be_loaded_says_why(spec: str, message: str) -> None:
    with pytest.raises(PortError, match=message):
        load_port(spec)


def test_a_file_that_raises_is_reported(tmp_path: Path) -> None:
    file = tmp_path / "broken.py"
    file.write_text("raise RuntimeError('needs a licence')\n")
    with pytest.raises(PortError, match="RuntimeError: needs a licence"):
        load_port(str(file))


def test_an_unknown_arithmetic_is_refused() -> None:
    module = types.ModuleType("mine")
    module.SVDLinear4bit = lambda: None  # type: ignore[attr-defined]
    module.ADAPTER_ARITHMETIC = "float8"  # type: ignore[attr-defined]
    with pytest.raises(PortError, match="must be 'float32' or 'input'"):
        port_from_module(module, "mine")


def test_an_attribute_that_is_not_callable_is_refused() -> None:
    module = types.ModuleType("mine")
    module.SVDLinear4bit = 3  # type: ignore[attr-defined]
    with pytest.raises(PortError, match="is not callable"):
        port_from_module(module, "mine")


# --- ports and the optional chapter -----------------------------------------------------------------


def module_with(**names: object) -> types.ModuleType:
    """A port module of one honest layer, and what else is given."""
    module = types.ModuleType("mine")
    vars(module).update(SVDLinear4bit=SVDLinear4bit, __version__="1.0", **names)
    return module


def answers_of(port: Port, *identifiers: str) -> dict[str, Answer]:
    profile = replace(QUICK, max_examples=2)
    return {
        identifier: judge(decider_of(identifier), Trial(port=port, kind="4bit", profile=profile))
        for identifier in identifiers
    }


def test_a_port_without_an_allocator_is_not_asked_and_conforms() -> None:
    port = port_from_module(module_with(), "mine")
    rank = [c for c in clauses() if c.startswith("RANK-")]

    answers = answers_of(port, *rank, "SCALE-2")

    assert answers.pop("SCALE-2").status == "pass"
    assert {a.status for a in answers.values()} == {"not-provided"}
    assert answers["RANK-1"].message == "the port offers no RankAllocator"
    assert answers["RANK-20"].message == "the port offers no orthogonal_penalty"
    outcomes = [Outcome("mine", c, "4bit", a.status) for c, a in answers.items()]
    assert PortVerdict(
        "mine", "1.0", [*outcomes, Outcome("mine", "SCALE-2", "4bit", "pass")]
    ).passed


def test_a_port_may_offer_the_penalty_alone() -> None:
    port = port_from_module(module_with(orthogonal_penalty=HonestPenalty()), "mine")

    answers = answers_of(port, "RANK-1", "RANK-20", "RANK-21", "RANK-22")

    assert [a.status for a in answers.values()] == ["not-provided", "pass", "pass", "pass"]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ({"RankAllocator": HonestAllocator}, "has a `RankAllocator` and no `AdaLoraConfig`"),
        ({"RankAllocator": 3, "AdaLoraConfig": HonestConfig}, "`RankAllocator` is not callable"),
        ({"orthogonal_penalty": 0.5}, "`orthogonal_penalty` is not callable"),
    ],
)
def test_half_an_offer_is_refused(names: dict[str, object], message: str) -> None:
    with pytest.raises(PortError, match=message):
        port_from_module(module_with(**names), "mine")


class StepsWithoutScale:
    """No `grad_scale`, and no state."""

    def __init__(self, *given: Any) -> None: ...

    def step(self, global_step: int) -> int:
        return 4


def test_an_allocator_that_lacks_a_method_is_told_which() -> None:
    class Nothing(StepsWithoutScale):
        step = None  # type: ignore[assignment]

    def failing(allocator: type, identifier: str) -> str:
        given = {"RankAllocator": allocator, "AdaLoraConfig": HonestConfig}
        (answer,) = answers_of(port_from_module(module_with(**given), "mine"), identifier).values()
        assert answer.status == "fail"
        return answer.message

    assert "The allocator has no `step`; chapter RANK of SPEC.md" in failing(Nothing, "RANK-5")
    assert "`step` takes no `grad_scale`" in failing(StepsWithoutScale, "RANK-13")
    assert "no `state_dict` and no `load_state_dict`" in failing(Stateless, "RANK-19")


class Stateless(HonestAllocator):
    """All but the state."""

    state_dict = load_state_dict = None  # type: ignore[assignment]

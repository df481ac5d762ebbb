"""A trial counts what it did, compares without mercy, and refuses to pass on nothing."""

from __future__ import annotations

import types
from contextlib import nullcontext
from dataclasses import replace

import numpy as np
import pytest
import torch

from conformance.case import Case
from conformance.oracle import Bounded
from conformance.port import port_from_module
from conformance.spec import clause
from conformance.test_gradients import assert_gradients
from conformance.trial import NotApplicable, Trial, run_clause
from conformance.violation import Violation
from tests.mutants import honest
from tests.mutants.variants import VARIANTS

HONEST = port_from_module(honest, "honest")
CASE = Case("4bit", batch=(2,))


def trial() -> Trial:
    return Trial(port=HONEST, kind="4bit")


def bounded(value: float | list[float], bound: float) -> Bounded:
    expected = np.atleast_1d(np.array(value, dtype=np.float64))
    return Bounded(expected, np.full_like(expected, bound))


def test_a_test_that_compares_nothing_fails() -> None:
    @clause("FWD-1")
    def test_lazy(trial: Trial) -> None:
        trial.calls += 1

    with pytest.raises(Violation, match="never compared anything"):
        run_clause(test_lazy, trial())


def test_a_call_alone_compares_nothing() -> None:
    @clause("FWD-1")
    def test_calls(trial: Trial) -> None:
        trial.check(lambda case: void(trial.build(case).forward()), [CASE])

    def void(_y: object) -> None: ...

    with pytest.raises(Violation, match="never compared anything"):
        run_clause(test_calls, trial())


def test_a_test_that_never_calls_the_port_fails() -> None:
    @clause("FWD-1")
    def test_idle(trial: Trial) -> None:
        trial.assert_that(True, "")

    with pytest.raises(Violation, match="never called the port"):
        run_clause(test_idle, trial())


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1.2])
def test_nan_infinity_and_excess_never_pass(value: float) -> None:
    with pytest.raises(Violation, match=r"y\[0\] is off by"):
        trial().assert_within("y", torch.tensor([value]), bounded(1.0, 0.1))


def test_nan_does_not_pass_a_nan_bound() -> None:
    with pytest.raises(Violation):
        trial().assert_within("y", torch.tensor([1.0]), bounded(1.0, float("nan")))


def test_the_worst_ratio_is_kept() -> None:
    asked = trial()
    asked.assert_within("y", torch.tensor([1.05]), bounded(1.0, 0.1))
    asked.assert_within("y", torch.tensor([1.01]), bounded(1.0, 0.1))
    assert asked.worst_ratio == pytest.approx(0.5, rel=1e-5)  # 1.05 is rounded to fp32
    assert asked.compared == 2


def test_margins_are_kept_by_the_dtype_of_the_case() -> None:
    asked = trial()

    def body(case: Case) -> None:
        # fp32, as the parameters' gradients are in every case: the case's dtype is what counts.
        asked.assert_within("dE", torch.tensor([1.03125, 1.0]), bounded([1.0, 1.0], 0.125))

    for dtype in ("float32", "bfloat16", "bfloat16"):
        asked.example(Case("4bit", dtype), body)
    with pytest.raises(Violation):
        asked.assert_within("y", torch.tensor([2.0]), bounded(1.0, 0.125))
    half, single = asked.margins
    assert (half.dtype, half.count, half.median, half.worst) == ("bfloat16", 3, 0.25, 8.0)
    assert (half.bins[5], half.bins[-1], sum(half.bins)) == (2, 1, 3)
    assert (single.dtype, single.count, single.worst) == ("float32", 1, 0.25)


def test_exact_and_empty_comparisons_have_no_margin() -> None:
    asked = trial()
    asked.assert_same_bits("y", torch.ones(3), torch.ones(3))
    asked.assert_within("y", torch.ones(0), bounded([], 0.1))
    assert asked.margins == ()


def test_a_wrong_shape_is_no_match() -> None:
    with pytest.raises(Violation, match=r"shape \(1, 1\), expected \(1,\)"):
        trial().assert_within("y", torch.tensor([[1.0]]), bounded(1.0, 9.0))


def test_a_missing_tensor_is_no_match() -> None:
    with pytest.raises(Violation, match="dA is None"):
        trial().assert_same_bits("dA", None, torch.zeros(1))


def test_same_bits_has_no_tolerance() -> None:
    one = torch.tensor([1.0, float("nan"), 0.0])
    trial().assert_same_bits("y", one.clone(), one)
    trial().assert_same_bits("y", torch.tensor([1.0, float("nan"), -0.0]), one)
    with pytest.raises(Violation, match="which must be exact"):
        trial().assert_same_bits("y", torch.nextafter(one, torch.tensor(2.0)), one)


def test_an_exception_of_the_port_is_a_violation_that_names_the_case() -> None:
    broken = types.ModuleType("broken")

    def refuse(*_args: object, **_kwargs: object) -> None:
        raise RuntimeError("no such kernel\nsecond line")

    broken.SVDLinear4bit = refuse  # type: ignore[attr-defined]

    @clause("FWD-1")
    def test_it(trial: Trial) -> None:
        trial.check(lambda case: trial.build(case), [CASE])

    with pytest.raises(Violation, match=r"RuntimeError.*no such kernel") as caught:
        run_clause(test_it, Trial(port=port_from_module(broken, "broken"), kind="4bit"))
    assert caught.value.case == CASE
    assert caught.value.clause is not None
    assert caught.value.clause.id == "FWD-1"


def test_the_search_shrinks_to_a_whiteboard_case() -> None:
    from conformance.strategies import cases

    asked = trial()

    def body(case: Case) -> None:
        asked.assert_that(case.out_features < 8, "out is too large")

    with pytest.raises(Violation) as caught:
        asked.search(cases("4bit"), body)
    found = caught.value.case
    assert found is not None
    assert (found.dtype, found.in_features, found.batch, found.ranks) == ("float32", 4, (1,), (1,))
    assert found.out_features == 8


def test_a_search_is_decided_by_its_seed() -> None:
    from conformance.strategies import cases

    def seen(seed: int) -> list[Case]:
        found: list[Case] = []
        Trial(port=HONEST, kind="4bit", seed=seed).search(cases("4bit"), found.append)
        return found

    assert seen(1) == seen(1)
    assert seen(1) != seen(2)


def test_only_the_given_case_is_run() -> None:
    from conformance.strategies import cases

    found: list[Case] = []
    asked = Trial(port=HONEST, kind="4bit", only=CASE)
    asked.search(cases("4bit"), found.append, [Case("4bit", seed=3)])
    asked.check(found.append, [Case("4bit", seed=4)])
    assert found == [CASE, CASE]


def test_a_clause_that_cannot_be_asked_is_no_pass() -> None:
    with pytest.raises(NotApplicable, match="no GPU"):
        trial().require(False, "no GPU")


def test_a_case_survives_its_json() -> None:
    case = Case("8bit", "bfloat16", batch=(), ranks=(3, 5), alphas=(0.5, -1.0), threshold=6.0)
    assert Case.from_json(case.to_json()) == case
    assert Case.from_json(CASE.to_json()) == CASE


@pytest.mark.parametrize("text", ['{"kind":"4bit","typo":1}', "{}", "not json"])
def test_a_malformed_case_is_refused(text: str) -> None:
    with pytest.raises(ValueError):
        Case.from_json(text)


@pytest.mark.parametrize("loud", [False, True])
def test_where_a_gradient_may_leave_fp16_nobody_is_blamed(loud: bool) -> None:
    """
    dout @ B is dx's first product: a port that computes in the input's dtype may store it in fp16.
    """
    case = Case("4bit", "float16", in_features=8, out_features=64, batch=(2,))
    asked = Trial(port=VARIANTS["computes in the input's dtype"], kind="4bit")
    setup = asked.build(case)
    dout = np.full_like(setup.data.dout, 2.0**15 if loud else 1.0)
    overflowed = replace(setup.run(), dA=(torch.full((case.ranks[0], 8), torch.inf),))
    with nullcontext() if loud else pytest.raises(Violation, match="dA of `default`"):
        assert_gradients(asked, setup, overflowed, ("dA",), dout=dout)

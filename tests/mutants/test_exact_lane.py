"""The exact lane catches its faults with certainty: in every one of its cases, not in some of them.

Where a fault shows is stated, and asserted both ways: y and dx of bf16 and fp16 round a wrong 1e-5 away
unless the divisor is small (the lane's last case); dA, dE and dB are fp32 and show it everywhere.
"""

from __future__ import annotations

import pytest

from conformance import oracle
from conformance.case import Case
from conformance.spec import KINDS, Kind
from conformance.strategies import dyadic_cases
from conformance.trial import Trial
from tests.mutants.asking import verdict
from tests.mutants.gallery import MUTANTS
from tests.mutants.variants import VARIANTS

HONEST = VARIANTS["the honest layer"]
EPSILONS = ("leaves out the 1e-5", "adds 1e-4", "adds 1e-6")
FACTORS = (
    "applies the singular values twice",
    "divides by r and by ranknum",
    "subtracts the update",
    "backward: the gradient of x has the scale twice",
)
BROADCASTS = ("scales all ranks by the first singular value", "scales the base output, too")
IN_BACKWARD = ("lacks the 1e-5", "has 1e-4 for 1e-5", "has the scale twice")
LANES = [
    pytest.param(kind, number, id=f"{kind}-{number}")
    for kind in KINDS
    for number in range(len(list(dyadic_cases("4bit"))))
]
EXACT = "which must be exact"


def lane_case(kind: Kind, number: int) -> Case:
    return list(dyadic_cases(kind))[number]


def small_divisor(case: Case) -> bool:
    return case.ranknum(0) < 1e-2


def sees(clause: str, mutant: str, case: Case) -> bool:
    """Whether the lane's clause, asked of this one case, blames the mutant for bits that are off."""
    trial = Trial(port=MUTANTS[mutant].port, kind=case.kind, only=case)
    found = verdict(clause, trial)
    assert not found or EXACT in found
    return bool(found)


@pytest.mark.parametrize(("kind", "number"), LANES)
def test_every_case_of_the_lane_compares_everything(kind: Kind, number: int) -> None:
    """No case is left out because its sums might round, and none leaves a format's range."""
    case = lane_case(kind, number)
    trial = Trial(port=HONEST, kind=kind)
    setup = trial.build(case)
    base, adapters, dtype = setup.base_run(), setup.adapters(), case.torch_dtype
    everywhere = oracle.arithmetic_for(trial.port, case.dtype, trial.device, compute=case.dtype)
    assert oracle.in_domain(setup.data.x, adapters, base.y, everywhere)
    assert oracle.exact_output(setup.data.x, adapters, base.y, dtype) is not None
    gradients = oracle.exact_gradients(setup.data.x, adapters[0], setup.data.dout, base.dx, dtype)
    assert set(gradients) == {"dx", "dA", "dE", "dB"}


@pytest.mark.parametrize(("kind", "number"), LANES)
def test_a_wrong_epsilon_shows_in_y(kind: Kind, number: int) -> None:
    case = lane_case(kind, number)
    expected = case.dtype == "float32" or small_divisor(case)
    assert {m: sees("FWD-2", m, case) for m in EPSILONS} == dict.fromkeys(EPSILONS, expected)


@pytest.mark.parametrize(("kind", "number"), LANES)
def test_a_wrong_epsilon_shows_in_the_gradients(kind: Kind, number: int) -> None:
    """In every dtype, since the parameters' gradients are fp32 in every dtype."""
    case = lane_case(kind, number)
    assert {m: sees("GRAD-5", m, case) for m in EPSILONS} == dict.fromkeys(EPSILONS, True)


@pytest.mark.parametrize(("kind", "number"), LANES)
def test_a_wrong_factor_or_broadcast_shows_everywhere(kind: Kind, number: int) -> None:
    case = lane_case(kind, number)
    wrong = [*FACTORS[:1], *FACTORS[2:3], *BROADCASTS[1:]]
    wrong += [] if case.ranks[0] == 1 else [FACTORS[1], BROADCASTS[0]]
    assert [m for m in wrong if not sees("FWD-2", m, case)] == []
    assert [m for m in wrong if not sees("GRAD-5", m, case) and "base output" not in m] == []


@pytest.mark.parametrize(("kind", "number"), LANES)
@pytest.mark.parametrize("part", ["x", "A", "E", "B"])
def test_a_fault_in_one_gradient_shows_there(part: str, kind: Kind, number: int) -> None:
    case = lane_case(kind, number)
    rounded = part == "x" and case.dtype != "float32" and not small_divisor(case)
    for fault in IN_BACKWARD:
        wanted = not (rounded and "1e-5" in fault)
        assert sees("GRAD-5", f"backward: the gradient of {part} {fault}", case) == wanted


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "mutant",
    [
        "applies E along the inputs where r is in",
        "applies E along the outputs where r is out",
        "applies E along the rows where there are r of them",
    ],
)
def test_a_wrong_axis_shows_where_it_fits(mutant: str, kind: Kind) -> None:
    """In every dtype, in the case that has the shape."""
    seen = {case.dtype for case in dyadic_cases(kind) if sees("FWD-2", mutant, case)}
    assert seen == {"float32", "bfloat16", "float16"}

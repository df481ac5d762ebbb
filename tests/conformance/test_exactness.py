"""The exact lane: what is certified is exact in every evaluation order, and enough is certified."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch

from conformance import oracle
from conformance.case import DTYPES, TORCH_DTYPES, Case, Data, DType
from conformance.exactness import Dyadic
from conformance.spec import KINDS, Kind
from conformance.strategies import dyadic_cases
from conformance.trial import Trial
from conformance.values import draw
from reference import Adapter, Arithmetic, round_to
from tests.mutants.variants import VARIANTS
from tests.reference.pipelines import SUMS, Pipeline, pipelines

PARTS = ("dx", "dA", "dE", "dB")


def orders(dtype: DType) -> list[Pipeline]:
    """Four folds, five places for c in one step and in two, four orders of sums; strict and permissive."""
    return [
        replace(pipeline, two_steps=two_steps, adding=adding)
        for arithmetic in (Arithmetic.permissive(dtype), Arithmetic.strict(dtype))
        for turn in range(len(SUMS))
        for pipeline in pipelines(arithmetic, SUMS[turn:] + SUMS[:turn])
        for two_steps, adding in ((True, "io"), (False, "accumulator"))
    ]


def adapters_of(case: Case, data: Data) -> list[Adapter]:
    return [
        Adapter(v.A, v.E, v.B, scaling=case.alpha(i), ranknum=case.ranknum(i))
        for i, v in enumerate(data.adapters)
    ]


def flat(case: Case) -> tuple[Data, list[Adapter], np.ndarray, np.ndarray]:
    """The case's data with rows as one dimension, its adapters, and the exact base output and dx."""
    data = draw(case)
    data = replace(
        data,
        x=data.x.reshape(-1, case.in_features),
        dout=data.dout.reshape(-1, case.out_features),
    )
    bias = np.zeros(case.out_features) if data.bias is None else data.bias
    return data, adapters_of(case, data), data.x @ data.weight.T + bias, data.dout @ data.weight


@pytest.mark.parametrize("dtype", DTYPES)
def test_certified_outputs_have_the_same_bits_in_every_order(dtype: DType) -> None:
    """One adapter and three, in every order of evaluation, stored in the input's dtype or in fp32."""
    certified = 0
    for count in (1, 3):
        for seed in (0, 10):
            for case in dyadic_cases("4bit", dtypes=(dtype,), adapters=count, seed=seed):
                data, adapters, base, _ = flat(case)
                given = torch.from_numpy(round_to(base, dtype)).to(TORCH_DTYPES[dtype])
                wanted = oracle.exact_output(data.x, adapters, given, TORCH_DTYPES[dtype])
                if wanted is None:
                    continue
                certified += 1
                for order in orders(dtype)[seed % 7 :: 7]:
                    y = order.output(data.x, adapters, round_to(base, dtype))
                    np.testing.assert_array_equal(y, wanted.double().numpy(), str((case, order)))
    assert certified >= 6


@pytest.mark.parametrize("dtype", DTYPES)
def test_certified_gradients_have_the_same_bits_in_every_order(dtype: DType) -> None:
    """dx, dA, dE and dB of each of the four folds, as autograd derives them."""
    certified: Counter[str] = Counter()
    for seed in (0, 10):
        for case in dyadic_cases("4bit", dtypes=(dtype,), seed=seed):
            data, adapters, _, base_dx = flat(case)
            given = torch.from_numpy(round_to(base_dx, dtype)).to(TORCH_DTYPES[dtype])
            wanted = oracle.exact_gradients(
                data.x, adapters[0], data.dout, given, TORCH_DTYPES[dtype]
            )
            certified.update(list(wanted))
            for order in orders(dtype)[seed % 7 :: 7]:
                dx, [leaves] = order.gradients(
                    data.x, adapters, data.dout, round_to(base_dx, dtype)
                )
                got = dict(zip(PARTS, (dx, *leaves), strict=True))
                for part, expected in wanted.items():
                    np.testing.assert_array_equal(
                        got[part], expected.double().numpy(), str((part, case, order))
                    )
    assert min(certified[part] for part in PARTS) >= 3, certified


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_enough_is_certified_on_real_base_layers(kind: Kind, dtype: DType) -> None:
    """A certificate that certifies nothing would make FWD-2 and GRAD-5 pass for nothing."""
    certified: Counter[str] = Counter()
    port = VARIANTS["the honest layer"]
    for case in dyadic_cases(kind, dtypes=(dtype,)):
        setup = Trial(port=port, kind=kind).build(case)
        base, adapters = setup.base_run(), setup.adapters()
        if oracle.exact_output(setup.data.x, adapters, base.y, case.torch_dtype) is not None:
            certified["y"] += 1
        gradients = oracle.exact_gradients(
            setup.data.x, adapters[0], setup.data.dout, base.dx, case.torch_dtype
        )
        certified.update(list(gradients))
    assert min(certified[part] for part in ("y", *PARTS)) >= 2, certified


def test_what_could_round_is_not_certified() -> None:
    """A scaling that is no power of two, data that are no integers, sums too long for the format."""
    singular, one = np.array([0.5, 2.0, 0.0]), [np.ones(3)]
    dyadic = Dyadic((4.0,), (8.0,), singular)
    assert dyadic.quantum == 0.25
    assert dyadic.applies(one)
    assert not dyadic.applies([np.array([0.5])])
    assert not Dyadic((3.0,), (8.0,), singular).applies(one)
    assert not Dyadic((4.0,), (8.00001,), singular).applies(one)
    assert not Dyadic((4.0,), (8.0,), np.array([0.75])).applies(one)

    zero, full = np.zeros(1), np.array([64.0])  # 2**8 quanta
    assert dyadic.certifies(full, zero, torch.bfloat16)
    assert not dyadic.certifies(full + 0.25, zero, torch.bfloat16)
    assert dyadic.certifies(full + 0.25, zero, torch.float16)
    assert not dyadic.certifies(full, np.array([0.125]), torch.float32)
    assert not Dyadic((2.0**-12,), (8.0,), singular).certifies(zero, zero, torch.float16)


@pytest.mark.parametrize("power", range(5))
@pytest.mark.parametrize("alpha", [0.5, 2.0, 8.0])
def test_a_scale_formed_in_double_or_single_is_the_same_power_of_two(
    power: int, alpha: float
) -> None:
    """s / (ranknum + 1e-5) and 1 / (ranknum + 1e-5), wherever they are rounded to single."""
    ranknum = oracle.exact_ranknum(power)
    for kind in (float, np.float32):
        divisor = kind(ranknum) + kind(1e-5)
        assert np.float32(alpha / divisor) == alpha / 2.0**power
        assert np.float32(1.0 / divisor) == 2.0**-power

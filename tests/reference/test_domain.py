"""The domain keeps overflowing cases away from the bounds, and nothing else."""

from dataclasses import replace

import numpy as np
import pytest

from reference import Adapter, Arithmetic, gradients_in_domain, in_domain

ZERO = np.zeros((1, 1))


def scalar(x: float, A: float, E: float, B: float, scaling: float, ranknum: float) -> Adapter:
    """A layer of one input, one rank and one output."""
    return Adapter(*(np.full((1, 1), v) for v in (A, E, B)), scaling=scaling, ranknum=ranknum)


def test_a_product_that_overflows_float16_before_the_division_is_outside() -> None:
    """The true delta is 16384, but 131072 before it is divided by ranknum: PEFT's overflow."""
    a = scalar(1.0, 512.0, 1.0, 256.0, scaling=1.0, ranknum=8.0 - 1e-5)
    x = np.ones((1, 1))

    assert not in_domain(x, [a], ZERO, Arithmetic.strict("float16"))
    assert not in_domain(x, [a], ZERO, Arithmetic.permissive("float16"))
    assert in_domain(x, [a], ZERO, Arithmetic.strict("bfloat16"))
    assert in_domain(x, [replace(a, B=a.B / 8)], ZERO, Arithmetic.strict("float16"))


def test_a_hidden_value_out_of_range_matters_only_where_it_is_stored() -> None:
    """h = 2^18 with B = 2^-10: float32 intermediates hold it, float16 ones do not."""
    a = scalar(1.0, 2.0**9, 1.0, 2.0**-10, scaling=1.0, ranknum=1.0 - 1e-5)
    x = np.full((1, 1), 2.0**9)

    assert in_domain(x, [a], ZERO, Arithmetic.strict("float16"))
    assert not in_domain(x, [a], ZERO, Arithmetic.permissive("float16"))


def test_an_overflowing_sum_with_the_base_is_outside() -> None:
    """y itself must fit, and so must its partial sums."""
    a = scalar(1.0, 100.0, 1.0, 100.0, scaling=1.0, ranknum=1.0 - 1e-5)
    x, base = np.ones((1, 1)), np.full((1, 1), 60000.0)

    assert in_domain(x, [a], ZERO, Arithmetic.strict("float16"))
    assert not in_domain(x, [a], base, Arithmetic.strict("float16"))
    assert not in_domain(x, [a], -base, Arithmetic.strict("float16"))
    assert not in_domain(x, [a], np.full((1, 1), np.nan), Arithmetic.strict("float16"))


def test_scalars_that_float16_cannot_carry_are_outside_where_they_may_be_stored() -> None:
    """A scaling below 2^-14 loses its precision in float16, not in float32."""
    a = scalar(1.0, 1.0, 1.0, 1.0, scaling=1e-6, ranknum=1.0)
    x = np.ones((1, 1))

    assert in_domain(x, [a], ZERO, Arithmetic.strict("float16"))
    assert not in_domain(x, [a], ZERO, Arithmetic.permissive("float16"))


@pytest.mark.parametrize("which", ["dA", "dB", "dx"])
def test_a_gradient_that_overflows_is_outside(which: str) -> None:
    """The sum over 4,096 rows overflows float16 where products may be stored in it."""
    a = scalar(1.0, 1.0, 1.0, 1.0, scaling=1.0, ranknum=1.0 - 1e-5)
    x, dy, dx = np.ones((4096, 1)), np.ones((4096, 1)), None
    if which == "dA":
        x = x * 16.0
    if which == "dB":
        dy = dy * 16.0
    if which == "dx":
        x, dy, dx = x[:1], dy[:1], np.full((1, 1), 65000.0)

    assert not gradients_in_domain(x, [a], dy, dx, Arithmetic.permissive("float16"))
    assert gradients_in_domain(x, [a], dy, dx, Arithmetic.strict("float16")) == (which != "dx")
    assert gradients_in_domain(x, [a], dy, dx, Arithmetic.permissive("bfloat16"))


def test_an_empty_batch_and_rank_zero_are_inside() -> None:
    """There is nothing to overflow."""
    a = Adapter(np.zeros((0, 3)), np.zeros((0, 1)), np.zeros((2, 0)), 1.0, 0.5)
    for rows in (0, 2):
        x, y = np.ones((rows, 3)), np.ones((rows, 2))
        assert in_domain(x, [a], y, Arithmetic.permissive("float16"))
        assert gradients_in_domain(x, [a], y, x, Arithmetic.permissive("float16"))

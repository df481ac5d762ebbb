"""The scalars of a chain: what c = s / ρ' loses before it meets the data, in every way to form it."""

from itertools import product

import numpy as np
import pytest

from reference import FORMATS, Arithmetic, round_to
from reference.chain import Scale

ARITHMETICS = [Arithmetic.strict("float32"), *(Arithmetic.permissive(io) for io in FORMATS)]


@pytest.mark.parametrize("scaling", [3.0, 16.0, 2.75, 0.3, 1000.1, -8.0])
@pytest.mark.parametrize("ranknum", [0.5, 1.0, 8.0, 12.0, 1.1, 70.0, 300.7])
def test_no_way_to_form_the_scalar_loses_more_than_its_error(
    scaling: float, ranknum: float
) -> None:
    """ρ + 1e-5 in double, single or compute; s / ρ' or 1 / ρ', stored in single or compute."""
    ranknum = float(round_to(ranknum, "float32"))
    scale = Scale(scaling, ranknum + 1e-5)
    for arithmetic in ARITHMETICS:
        used = []
        for kept, stored in product(("float64", "float32", "compute"), ("float32", "compute")):

            def put(v: float, name: str, a: Arithmetic = arithmetic) -> float:
                if name == "float64":
                    return float(v)
                single = round_to(v, "float32")
                return float(round_to(single, a.compute) if name == "compute" else single)

            divisor = put(put(ranknum, kept) + put(1e-5, kept), kept)
            c = put(put(scaling, kept) / put(divisor, stored), stored)
            used.append(abs(c - scale.c) / abs(scale.c))
            # s is applied apart: what is lost on 1 / ρ' and on s together is the scalars' part.
            inverse = put(1.0 / put(divisor, stored), stored)
            used.append(abs(inverse * put(scaling, kept) - scale.c) / abs(scale.c))
        bound = np.expm1(2 * scale.error(arithmetic)) / 2  # the second order is the lemma's
        assert max(used) <= bound


@pytest.mark.parametrize(
    ("scaling", "products"), [(16.0, 1), (-0.5, 1), (0.0, 1), (3.0, 2), (2.75, 2)]
)
def test_a_power_of_two_is_multiplied_by_for_nothing(scaling: float, products: int) -> None:
    assert Scale(scaling, 8.00001).products == products

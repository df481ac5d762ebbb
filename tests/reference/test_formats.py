"""Rounding into float32, bfloat16 and float16 is correct rounding, and errs as `Format` says."""

import numpy as np
import pytest
import torch

from reference import FLOAT64, FORMATS, TF32, round_to
from reference.formats import power_of_two_below

TORCH = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def hard_values() -> np.ndarray:
    """Every magnitude from below the smallest subnormal to above the largest number, and ties."""
    rng = np.random.default_rng(0)
    spread = rng.standard_normal(4000) * 2.0 ** rng.integers(-160, 130, 4000)
    halves = rng.standard_normal(4000) * 2.0 ** rng.integers(-30, 18, 4000)
    ties = np.array([1 + 2.0**-8, 1 + 3 * 2.0**-8, 1 + 2.0**-11, 1 + 3 * 2.0**-11, 2.0**-25])
    edges = np.array(
        [0.0, -0.0, 65504, 65519.99, 65520, 3.3895e38, 3.4e38, np.inf, -np.inf, np.nan]
    )
    return np.concatenate([spread, halves, ties, -ties, edges])


@pytest.mark.parametrize("name", FORMATS)
def test_rounding_agrees_with_torch_on_float32_values(name: str) -> None:
    """It gives PyTorch's bits for every float32 value, ties, subnormals and overflow included."""
    with np.errstate(over="ignore"):
        values = hard_values().astype(np.float32)

    expected = torch.from_numpy(values).to(TORCH[name]).double().numpy()
    np.testing.assert_array_equal(round_to(values, name), expected)


def test_rounding_to_float16_is_not_rounded_twice() -> None:
    """A double just above a tie goes up, although float32 would make it the tie."""
    just_above = 1 + 2.0**-11 + 2.0**-40

    assert round_to(just_above, "float16") == 1 + 2.0**-10
    assert round_to(float(np.float32(just_above)), "float16") == 1.0


@pytest.mark.parametrize("fmt", [*FORMATS.values(), FLOAT64, TF32], ids=lambda f: f.name)
def test_every_rounding_obeys_the_model_of_one_store(fmt) -> None:
    """|fl(v) - v| <= u |v| + η for every v up to the largest number."""
    values = hard_values()
    values = values[np.abs(values) <= fmt.largest]

    error = np.abs(round_to(values, fmt) - values)
    assert (error <= fmt.roundoff * np.abs(values) + fmt.underflow).all()


def test_constants_are_those_of_the_formats() -> None:
    """Roundoff, underflow and largest number are IEEE 754's (and η allows a flush to zero)."""
    for name, fmt in FORMATS.items():
        info = torch.finfo(TORCH[name])
        assert (fmt.roundoff, fmt.largest) == (info.eps / 2, info.max)
        assert fmt.smallest_normal == info.tiny
    assert FORMATS["float16"].underflow == 2.0**-25
    assert FORMATS["bfloat16"].underflow == FORMATS["float32"].underflow == 2.0**-126


def test_rounding_twice_changes_nothing() -> None:
    """What is in the format stays as it is."""
    for name in FORMATS:
        once = round_to(hard_values(), name)
        np.testing.assert_array_equal(round_to(once, name), once)


def test_an_unknown_format_is_refused_by_name() -> None:
    """The message names the format and the known ones."""
    with pytest.raises(ValueError, match=r"`float8`.*`bfloat16`"):
        round_to(1.0, "float8")


def test_half_a_unit_in_the_last_place_bounds_a_rounding() -> None:
    """roundoff times the power of two below is never more than roundoff times the value, and is reached."""
    rng = np.random.default_rng(0)
    v = np.abs(rng.standard_normal(4096)) * 2.0 ** rng.integers(-8, 8, 4096)
    below = power_of_two_below(v)

    assert ((below <= v) & (v < 2 * below)).all()
    error = np.abs(round_to(v, "bfloat16") - v)
    assert (error <= 2.0**-8 * below).all()
    assert error.max() > 0
    assert (error / below).max() > 0.95 * 2.0**-8
    np.testing.assert_array_equal(power_of_two_below(np.array([0.0, 1.0, 3.0])), [0.0, 1.0, 2.0])

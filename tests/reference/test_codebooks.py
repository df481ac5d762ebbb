"""The derived code books are bitsandbytes' tables, bit for bit."""

import numpy as np
import pytest

from reference import codebook, dynamic_map, fp4, nf4

functional = pytest.importorskip("bitsandbytes.functional")


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_four_bit_code_books_are_the_librarys_bits(quant_type: str) -> None:
    """Sixteen float32 values in the order of their codes."""
    theirs = functional.get_4bit_type(quant_type, device="cpu").numpy()

    assert codebook(quant_type).dtype == np.float32
    np.testing.assert_array_equal(codebook(quant_type), theirs)


def test_the_dynamic_map_is_the_librarys_bits() -> None:
    """All 256 values, on processors whose PyTorch fuses products and sums in linspace."""
    np.testing.assert_array_equal(dynamic_map(), functional.create_dynamic_map().numpy())


def test_nf4_is_asymmetric_about_a_single_zero() -> None:
    """Seven negative values, zero at code 7, eight positive ones; both ends are one."""
    values = nf4()
    assert (np.diff(values) > 0).all()
    assert (values[0], values[7], values[15]) == (-1.0, 0.0, 1.0)


def test_fp4_spells_sign_exponent_and_mantissa() -> None:
    """In twelfths: 0, 1/16, 8, 12, 4, 6, 2, 3, and the same below zero."""
    halves = np.array([0, 0.0625, 8, 12, 4, 6, 2, 3], dtype=np.float32) / np.float32(12)
    np.testing.assert_array_equal(fp4(), np.concatenate([halves, -halves]))


def test_code_books_cannot_be_written_to() -> None:
    """They are shared, so they are read-only."""
    with pytest.raises(ValueError, match="read-only"):
        nf4()[0] = 0.0


def test_an_unknown_type_is_refused() -> None:
    """The message shows what was given."""
    with pytest.raises(ValueError, match="got 'int4'"):
        codebook("int4")

"""The adapter's forward is the contract's formula, and its gradients are the formula's."""

from dataclasses import replace

import numpy as np
import pytest

from reference import Adapter, backward, forward, output

STEP = 1e-200  # complex step: no subtraction, so no cancellation, however small the step


def an_adapter(rank: int = 3, dtype: type = np.float64, keep: np.ndarray | None = None) -> Adapter:
    rng = np.random.default_rng(rank)
    A, E, B = (rng.standard_normal(s).astype(dtype) for s in ((rank, 5), (rank, 1), (4, rank)))
    return Adapter(A, E, B, scaling=16.0, ranknum=6.0, keep=keep, p=0.0 if keep is None else 0.25)


def test_forward_is_the_formula_written_as_loops() -> None:
    """delta[o] = sum over j, i of x̃_i A_ji E_j B_oj, times scaling / (ranknum + 1e-5)."""
    rng = np.random.default_rng(0)
    a = an_adapter(keep=rng.random((2, 5)) < 0.75)
    x = rng.standard_normal((2, 5))

    expected = np.zeros((2, 4))
    for m, o, j, i in np.ndindex(2, 4, 3, 5):
        dropped = x[m, i] / 0.75 if a.keep[m, i] else 0.0
        expected[m, o] += dropped * a.A[j, i] * a.E[j, 0] * a.B[o, j] * 16.0 / (6.0 + 1e-5)
    # 15 terms of magnitude sum |.|, each with at most 20 roundings of float64.
    allowed = 20 * 2.0**-53 * forward(np.abs(x), magnitudes(a))[0]
    assert (np.abs(forward(x, a)[0] - expected) <= allowed).all()


def magnitudes(a: Adapter) -> Adapter:
    return replace(a, A=np.abs(a.A), E=np.abs(a.E), B=np.abs(a.B))


@pytest.mark.parametrize("masked", [False, True], ids=["no dropout", "dropout"])
@pytest.mark.parametrize("lead", [(), (6,), (2, 3)], ids=str)
def test_gradients_agree_with_complex_step(lead: tuple[int, ...], masked: bool) -> None:
    """Each gradient is Im(loss(parameter + i h)) / h to a few units of float64's roundoff."""
    rng = np.random.default_rng(len(lead))
    a = an_adapter(keep=rng.random((*lead, 5)) < 0.75 if masked else None)
    x, g = rng.standard_normal((*lead, 5)), rng.standard_normal((*lead, 4))
    gradients = backward(g, forward(x, a)[1])
    sizes = backward(np.abs(g), forward(np.abs(x), magnitudes(a))[1])

    def loss(at: np.ndarray, **changed: np.ndarray) -> float:
        varied = replace(a, **{k: v.astype(complex) for k, v in parameters(a, changed).items()})
        return float((g * forward(at.astype(complex), varied)[0]).sum().imag)

    for name in ("x", "A", "E", "B"):
        value = x if name == "x" else getattr(a, name)
        got, size = getattr(gradients, f"d{name}"), getattr(sizes, f"d{name}")
        for index in np.ndindex(value.shape):
            nudged = value.astype(complex)
            nudged[index] += 1j * STEP
            slope = loss(nudged) if name == "x" else loss(x, **{name: nudged})
            # Two evaluations, each a sum of fewer than 6·4·5·3 terms with 8 roundings per term.
            assert abs(slope / STEP - got[index]) <= 2 * 30 * 2.0**-53 * size[index]


def parameters(a: Adapter, changed: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {"A": a.A, "E": a.E, "B": a.B, **changed}


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.complex128])
def test_bodies_follow_the_dtype_that_they_are_given(dtype: type) -> None:
    """float32 in gives float32 out, through forward, dropout and every gradient."""
    a = an_adapter(dtype=dtype, keep=np.ones((2, 5), dtype=bool))
    x = np.ones((2, 5), dtype=dtype)

    delta, cache = forward(x, a)
    assert delta.dtype == dtype
    assert {g.dtype for g in backward(delta, cache)} == {np.dtype(dtype)}


@pytest.mark.parametrize("lead", [(), (0,), (2, 0, 3), (2, 3, 2)], ids=str)
@pytest.mark.parametrize("rank", [0, 1, 7])
def test_shapes_hold_for_any_leading_dimensions_and_rank(lead: tuple[int, ...], rank: int) -> None:
    """No leading dimension, several, an empty one; rank 0 gives zeros."""
    a = an_adapter(rank)

    delta, cache = forward(np.ones((*lead, 5)), a)
    gradients = backward(np.ones((*lead, 4)), cache)
    assert delta.shape == (*lead, 4)
    assert [g.shape for g in gradients] == [(*lead, 5), (rank, 5), (rank, 1), (4, rank)]
    assert rank > 0 or not delta.any()


def test_leading_dimensions_are_only_rows() -> None:
    """Reshaping the input reshapes the output and leaves the parameters' gradients alone."""
    rng = np.random.default_rng(1)
    a, x, g = an_adapter(), rng.standard_normal((6, 5)), rng.standard_normal((6, 4))
    flat = backward(g, forward(x, a)[1])
    deep = backward(g.reshape(2, 3, 4), forward(x.reshape(2, 3, 5), a)[1])

    np.testing.assert_array_equal(flat.dx, deep.dx.reshape(6, 5))
    np.testing.assert_array_equal(flat.dA, deep.dA)


def test_output_adds_every_adapter_to_the_base() -> None:
    """y - base is the sum of the deltas, in float64 even for float32 arrays."""
    a, b = an_adapter(3, np.float32), an_adapter(2, np.float32)
    x, base = np.ones((2, 5), np.float32), np.zeros((2, 4), np.float32)

    y = output(base, x, [a, b])
    assert y.dtype == np.float64
    expected = forward(x.astype(float), in_double(a))[0] + forward(x.astype(float), in_double(b))[0]
    np.testing.assert_array_equal(y, expected)
    np.testing.assert_array_equal(output(base, x, []), base)


def in_double(a: Adapter) -> Adapter:
    return replace(a, A=a.A.astype(float), E=a.E.astype(float), B=a.B.astype(float))


def test_wrong_shapes_and_probabilities_are_refused() -> None:
    """The message shows what was given."""
    a = an_adapter()
    with pytest.raises(ValueError, match=r"\(3, 1\).*\(2, 1\)"):
        replace(a, E=a.E[:2])
    with pytest.raises(ValueError, match=r"`B` \(out, r\)"):
        replace(a, B=a.B[0])
    with pytest.raises(ValueError, match=r"\[0, 1\), got 1\.0"):
        replace(a, p=1.0)
    with pytest.raises(ValueError, match=r"`keep` has shape \(2, 5\)"):
        forward(np.ones((1, 5)), replace(a, keep=np.ones((2, 5), dtype=bool)))

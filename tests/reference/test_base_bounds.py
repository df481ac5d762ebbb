"""The base layer's bounds hold for PyTorch's linear layer and for kernels that round each term."""

import numpy as np
import pytest
import torch

from reference import FORMATS, Arithmetic, bound_base_dx, bound_base_output, round_to
from tests.reference.judging import ratio

TORCH = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
ARITHMETICS = {io: Arithmetic.permissive(io) for io in FORMATS}


def layer(seed: int, io: str) -> tuple[np.ndarray, np.ndarray, np.ndarray | None, np.ndarray]:
    """x (rows, in), a float32 weight (out, in), a float32 bias or none, dy (rows, out)."""
    rng = np.random.default_rng(seed)
    rows, n, out = (int(rng.integers(1, high)) for high in (6, 200, 20))
    x = rng.standard_normal((rows, n)) * rng.lognormal(0, 1, (rows, n))
    W = round_to(rng.standard_normal((out, n)) * 2.0 ** -rng.integers(0, 16), "float32")
    bias = round_to(rng.standard_normal(out), "float32") if seed % 2 else None
    return round_to(x, io), W, bias, round_to(rng.standard_normal((rows, out)), io)


def term_by_term(left: np.ndarray, right: np.ndarray, io: str) -> np.ndarray:
    """left @ right with code, absmax, weight and term rounded to io, summed in float32."""
    absmax = 0.37
    weight = round_to(round_to(right / absmax, io) * round_to(absmax, io), io)
    terms = round_to(left[:, :, None] * weight, io)
    return terms.astype(np.float32).sum(axis=1, dtype=np.float32).astype(np.float64)


@pytest.mark.parametrize("io", FORMATS)
def test_linear_layers_stay_within_the_bounds(io: str) -> None:
    """torch.nn.functional.linear with the weight cast to io, and its gradient by x."""
    seen = []
    for seed in range(60):
        x, W, bias, dy = layer(seed, io)
        tx, tw, tdy = (torch.tensor(a, dtype=TORCH[io]) for a in (x, W, dy))
        tb = None if bias is None else torch.tensor(bias, dtype=TORCH[io])
        y = torch.nn.functional.linear(tx, tw, tb).double().numpy()

        seen.append(ratio(y, bound_base_output(x, W, bias, ARITHMETICS[io])))
        seen.append(ratio((tdy @ tw).double().numpy(), bound_base_dx(dy, W, ARITHMETICS[io])))
    assert 0.05 < max(seen) <= 1.0


@pytest.mark.parametrize("io", ["bfloat16", "float16"])
def test_kernels_that_round_every_term_stay_within_the_bounds(io: str) -> None:
    """As bitsandbytes' CUDA kernels for few rows do."""
    for seed in range(0, 60, 2):
        x, W, _, _ = layer(seed, io)
        y = round_to(term_by_term(x, W.T, io), io)
        assert ratio(y, bound_base_output(x, W, None, ARITHMETICS[io])) <= 1.0


def test_one_product_and_no_product_are_sharp() -> None:
    """Identity x bounds W's entries by a few roundings; a zero row costs nothing."""
    _, W, _, _ = layer(0, "float32")
    x = np.vstack([np.eye(W.shape[1]), np.zeros(W.shape[1])])

    expected = bound_base_output(x, W, None, ARITHMETICS["float32"])
    np.testing.assert_array_equal(expected.value[:-1], W.T)
    assert (expected.bound[:-1] <= 5 * 2.0**-24 * np.abs(W.T)).all()
    assert not expected.bound[-1].any()


@pytest.mark.parametrize("io", FORMATS)
@pytest.mark.parametrize("fault", ["no bias", "reversed inputs", "zero gradient"])
def test_faults_of_a_base_exceed_the_bounds(io: str, fault: str) -> None:
    """A bias left out, inputs in the wrong order, a gradient of zeros."""
    x, W, bias, dy = layer(7, io)
    y = {"no bias": x @ W.T, "reversed inputs": x[:, ::-1] @ W.T + bias}.get(fault)

    if y is None:
        assert ratio(np.zeros_like(x), bound_base_dx(dy, W, ARITHMETICS[io])) > 1.0
    else:
        assert ratio(y, bound_base_output(x, W, bias, ARITHMETICS[io])) > 1.0


@pytest.mark.parametrize("lead", [(), (0,), (2, 3)], ids=str)
def test_base_bounds_take_any_leading_dimensions(lead: tuple[int, ...]) -> None:
    """Values and bounds have the shape of what they bound."""
    y = bound_base_output(np.ones((*lead, 5)), np.ones((4, 5)), None, ARITHMETICS["float16"])
    dx = bound_base_dx(np.ones((*lead, 4)), np.ones((4, 5)), ARITHMETICS["float16"])
    assert y.value.shape == y.bound.shape == (*lead, 4)
    assert dx.value.shape == dx.bound.shape == (*lead, 5)

"""The arrays of a case: families of values, each chosen for the faults that it shows."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from conformance.case import AdapterValues, Case, Data, exact
from conformance.real import real_data

Generator = np.random.Generator


def draw(case: Case) -> Data:
    """The arrays of a case; the same case always gives the same arrays."""
    if case.values == "real":
        return real_data(case)
    rng = np.random.default_rng([case.seed, case.in_features, case.out_features])
    data = _FAMILIES[case.values](case, rng)
    return _rounded(case, data)


def _rounded(case: Case, data: Data) -> Data:
    """Round every array to the dtype in which the layer gets it."""
    dtype = case.torch_dtype
    return Data(
        weight=exact(data.weight * case.base_scale, dtype),
        bias=None if data.bias is None else exact(data.bias * case.base_scale, dtype),
        x=exact(data.x, dtype),
        dout=exact(data.dout, dtype),
        adapters=tuple(
            AdapterValues(*(exact(v, torch.float32) for v in (a.A, a.E, a.B)))
            for a in data.adapters
        ),
    )


def _gaussian(case: Case, rng: Generator) -> Data:
    """Everything of order one: base and update weigh the same, and E has both signs."""
    n, m = case.in_features, case.out_features
    return Data(
        weight=rng.standard_normal((m, n)) / np.sqrt(n),
        bias=rng.standard_normal(m) if case.bias else None,
        x=rng.standard_normal((*case.batch, n)),
        dout=rng.standard_normal((*case.batch, m)),
        adapters=tuple(
            AdapterValues(
                A=rng.standard_normal((r, n)) / np.sqrt(n),
                E=rng.standard_normal((r, 1)),
                B=rng.standard_normal((m, r)),
            )
            for r in case.ranks
        ),
    )


def _lora(case: Case, rng: Generator) -> Data:
    """The scale of early training: A and B as initialised, E small."""
    data = _gaussian(case, rng)
    n = case.in_features
    return Data(
        data.weight,
        data.bias,
        data.x,
        data.dout,
        tuple(
            AdapterValues(a.A * (0.02 * np.sqrt(n)), a.E * 0.05, a.B * 0.02) for a in data.adapters
        ),
    )


def _heavy(case: Case, rng: Generator) -> Data:
    """Heavy tails, and one outlier feature of up to 300, as in transformers' activations."""
    data = _gaussian(case, rng)
    x = data.x * np.exp(rng.normal(0.0, 1.0, data.x.shape))
    x[..., rng.integers(case.in_features)] *= 60.0
    heavy = tuple(
        AdapterValues(*(v * np.exp(rng.normal(0.0, 1.0, v.shape)) for v in (a.A, a.E, a.B)))
        for a in data.adapters
    )
    x = np.clip(x, -300.0, 300.0)
    return Data(data.weight, data.bias, x, data.dout, heavy)


def _cancelling(case: Case, rng: Generator) -> Data:
    """Pairs of ranks that cancel but for a thousandth: small sums of large terms."""
    data = _gaussian(case, rng)
    adapters = []
    for a in data.adapters:
        A, E, B = a.A.copy(), a.E.copy(), a.B.copy()
        for j in range(1, A.shape[0], 2):
            A[j] = A[j - 1] * (1 + 1e-3 * rng.standard_normal(A.shape[1]))
            E[j] = -E[j - 1]
            B[:, j] = B[:, j - 1]
        adapters.append(AdapterValues(A, E, B))
    return Data(data.weight, data.bias, data.x, data.dout, tuple(adapters))


def _tiny(case: Case, rng: Generator) -> Data:
    """Near the lower end of fp16: intermediate results that a careless cast flushes to zero."""
    data = _gaussian(case, rng)
    small = 2.0**-8
    return Data(
        data.weight,
        data.bias,
        data.x * small,
        data.dout * small,
        tuple(AdapterValues(a.A, a.E * small, a.B) for a in data.adapters),
    )


def _onehot(case: Case, rng: Generator) -> Data:
    """One element of each row of x is alive, and one rank: single products, few roundings."""
    data = _gaussian(case, rng)
    x = np.zeros((int(np.prod(case.batch)), case.in_features))
    alive = (rng.integers(case.in_features) + np.arange(len(x))) % case.in_features
    x[np.arange(len(x)), alive] = 1.0
    adapters = []
    for a in data.adapters:
        E = np.zeros_like(a.E)
        if len(E):
            live = rng.integers(len(E))
            E[live] = a.E[live]
        adapters.append(AdapterValues(a.A, E, a.B))
    return Data(data.weight, data.bias, x.reshape(data.x.shape), data.dout, tuple(adapters))


def _dyadic(case: Case, rng: Generator) -> Data:
    """The exact lane: no conforming evaluation order rounds anywhere.

    x, A, B, dout in {-1, 0, 1}; E in {±1/2, ±1, ±2}; W in {-1, 0, 1} with a 1 in each block of 64
    and in each row, so that its scales are 1 and its codes exact. Then every term of every sum is a
    multiple of 2**-k and every partial sum has few bits (`oracle.certify_exact` checks it).
    """
    n, m = case.in_features, case.out_features

    def signs(shape: tuple[int, ...], density: float) -> np.ndarray:
        return rng.choice([-1.0, 0.0, 1.0], shape, p=[density / 2, 1 - density, density / 2])

    # About four live features a row keep the sums inside bf16's eight bits.
    live = min(1.0, 4.0 / n)
    weight = signs((m, n), min(1.0, 0.5))
    weight[:, 0] = 1.0
    flat = weight.reshape(-1)
    flat[::64] = 1.0
    return Data(
        weight=weight,
        bias=signs((m,), 0.7) if case.bias else None,
        x=signs((*case.batch, n), live),
        dout=signs((*case.batch, m), min(1.0, 3.0 / m)),
        adapters=tuple(
            AdapterValues(
                A=signs((r, n), min(1.0, 2.0 / 3.0)),
                E=rng.choice([-2.0, -1.0, -0.5, 0.5, 1.0, 2.0], (r, 1)),
                B=signs((m, r), min(1.0, 4.0 / max(r, 1))),
            )
            for r in case.ranks
        ),
    )


_FAMILIES: dict[str, Callable[[Case, Generator], Data]] = {
    "gaussian": _gaussian,
    "lora": _lora,
    "heavy": _heavy,
    "cancelling": _cancelling,
    "tiny": _tiny,
    "onehot": _onehot,
    "dyadic": _dyadic,
}

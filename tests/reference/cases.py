"""Seeded layers to judge bounds on: ordinary, heavy-tailed, cancelling, tiny, probing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from reference import Adapter, round_to

F64 = NDArray[np.float64]

Family = Literal["ordinary", "lora", "heavy", "cancelling", "tiny", "probe"]
FAMILIES: tuple[Family, ...] = ("ordinary", "lora", "heavy", "cancelling", "tiny", "probe")


@dataclass(frozen=True)
class Case:
    """x (rows, in), adapters, base (rows, out), dout (rows, out), base_dx (rows, in), in `io`."""

    io: str
    x: F64
    adapters: tuple[Adapter, ...]
    base: F64
    dout: F64
    base_dx: F64


def case(seed: int, family: Family, io: str) -> Case:
    """One random layer of the family; the same for the same arguments."""
    rng = np.random.default_rng([seed, FAMILIES.index(family)])
    rows, features_in, out = (int(rng.integers(1, high)) for high in (7, 70, 24))
    x, base, dout, base_dx = (
        rng.standard_normal(shape)
        for shape in ((rows, features_in), (rows, out), (rows, out), (rows, features_in))
    )
    if family == "heavy":
        x, dout = x * rng.lognormal(0.0, 2.0, x.shape), dout * rng.lognormal(0.0, 2.0, dout.shape)
    if family == "tiny":
        x, dout = x * 2.0**-12, dout * 2.0 ** rng.integers(-14, -6)
        base, base_dx = base * 2.0**-16, base_dx * 2.0**-20
    if family == "cancelling":
        x = np.concatenate([x, -x * (1 + 0.01 * rng.standard_normal(x.shape))], axis=1)
        base_dx = np.concatenate([base_dx, base_dx], axis=1)
        features_in *= 2
    if family == "probe":
        x, dout = (np.where(_one_hot(rng, m.shape), m, 0.0) for m in (x, dout))
        base = np.where(rng.random(base.shape) < 0.5, 0.0, base)
    adapters = tuple(
        _adapter(rng, family, rows, features_in, out) for _ in range(int(rng.integers(1, 4)))
    )
    return Case(io, *_exact(io, x), adapters, *_exact(io, base, dout, base_dx))


def _exact(io: str, *arrays: F64) -> tuple[F64, ...]:
    return tuple(round_to(a, io) for a in arrays)


def _one_hot(rng: np.random.Generator, shape: tuple[int, ...]) -> NDArray[np.bool_]:
    return np.arange(shape[1]) == rng.integers(shape[1], size=(shape[0], 1))


def _adapter(
    rng: np.random.Generator, family: Family, rows: int, features_in: int, out: int
) -> Adapter:
    rank = int(rng.integers(0, 9))
    A, E, B = (rng.standard_normal(s) for s in ((rank, features_in), (rank, 1), (out, rank)))
    if family == "lora":
        A, E, B = A * 0.02, E * 0.05, B * 0.02
    if family == "heavy":
        A, E = A * rng.lognormal(0.0, 1.5, A.shape), E * rng.lognormal(0.0, 1.0, E.shape)
    if family == "tiny":
        A, E, B = A * 2.0**-8, E * 2.0**-4, B * 2.0 ** rng.integers(-8, 0)
    if family == "cancelling":
        half = features_in // 2
        A[:, half:] = A[:, :half] * (1 + 0.01 * rng.standard_normal((rank, half)))
    E = np.where(rng.random(E.shape) < 0.2, 0.0, E)
    keep, p = None, 0.0
    if rng.random() < 0.3:
        p = float(rng.choice([0.1, 0.5, 0.9]))
        keep = rng.random((rows, features_in)) >= p
    return Adapter(
        *(round_to(m, "float32") for m in (A, E, B)),
        scaling=float(rng.choice([1.0, 0.1, 8.0, 16.0, 32.0])),
        ranknum=float(rng.choice([1.0, 8.0, 12.0, 0.5, max(rank, 1)])),
        keep=keep,
        p=p,
    )

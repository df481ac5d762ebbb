"""Numbers that are the same on every machine and in every language: bits of SHAKE-256.

NumPy may change what its generators draw from one release to the next, and a normal draw passes
through the platform's logarithm. Here each tensor has a stream of its own, named by the seed, the
vector and the tensor, and only integers are added: a new vector changes no other.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import numpy as np
from numpy.typing import NDArray

F64 = NDArray[np.float64]
Shape = Sequence[int]


@dataclass(frozen=True)
class Stream:
    """The draws of one vector."""

    seed: int
    vector: str

    def bits(self, name: str, shape: Shape) -> NDArray[np.uint64]:
        """64 bits an element."""
        key = f"{self.seed}/{self.vector}/{name}".encode()
        data = hashlib.shake_256(key).digest(8 * prod(shape))
        return np.frombuffer(data, dtype="<u8").reshape(tuple(shape)).astype(np.uint64)

    def bell(self, name: str, shape: Shape) -> F64:
        """The sum of four uniform numbers less its mean: within ±4, deviation 1.15.

        Bell-shaped, and exact: a multiple of 2^-15, made of integers.
        """
        bits = self.bits(name, shape)
        total = np.zeros(tuple(shape), dtype=np.int64)
        for quarter in range(4):
            total += ((bits >> np.uint64(16 * quarter)) & np.uint64(0xFFFF)).astype(np.int64)
        return np.asarray((total - 2 * 0xFFFF) * 2.0**-15, dtype=np.float64)

    def uniform(self, name: str, shape: Shape) -> F64:
        """In [0, 1), multiples of 2^-32."""
        high: F64 = (self.bits(name, shape) >> np.uint64(32)).astype(np.float64)
        return np.asarray(np.ldexp(high, -32))

    def choice(self, name: str, shape: Shape, values: Sequence[float]) -> F64:
        """One of the values, each as likely as it is listed."""
        picked = self.bits(name, shape) % np.uint64(len(values))
        options: F64 = np.asarray(values, dtype=np.float64)
        chosen: F64 = options[picked.astype(np.intp)]
        return chosen

    def keep(self, name: str, shape: Shape, p: float) -> NDArray[np.bool_]:
        """A dropout mask: True with probability 1 - p."""
        return np.asarray(self.uniform(name, shape) >= p)

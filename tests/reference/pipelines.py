"""Valid implementations of the contract, emulated: folds, orders of sums, storage formats."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from reference import Adapter, Arithmetic, round_to

F64 = NDArray[np.float64]

Fold = Literal["A", "hidden", "B", "dense"]
ScaleAt = Literal["A", "hidden", "B", "result", "io"]
Sums = Literal["blas", "forward", "backward", "blocks", "truncating"]
Adding = Literal["io", "accumulator"]

FOLDS: tuple[Fold, ...] = ("A", "hidden", "B", "dense")
SCALES: tuple[ScaleAt, ...] = ("A", "hidden", "B", "result", "io")
SUMS: tuple[Sums, ...] = ("blas", "forward", "backward", "blocks")


def truncated(values: F64) -> F64:
    """Values cut, not rounded, to the 24 bits of a float32, as tensor cores do."""
    with np.errstate(over="ignore"):
        near = values.astype(np.float32)
    too_far = np.abs(near.astype(np.float64)) > np.abs(values)
    return np.where(too_far, np.nextafter(near, np.float32(0)), near).astype(np.float64)


def product(left: F64, right: F64, sums: Sums, start: F64 | None = None) -> F64:
    """left @ right accumulated in float32, in the given order, from `start` if there is one."""
    a, b = left.astype(np.float32), right.astype(np.float32)
    shape = (a.shape[0], b.shape[1])
    acc = np.zeros(shape, np.float32) if start is None else start.astype(np.float32)
    columns = list(range(a.shape[1]))
    if sums == "blas":
        return (a @ b + acc).astype(np.float64)
    if sums == "blocks":
        for block in np.array_split(columns, max(1, len(columns) // 5)):
            part = np.zeros(shape, np.float32)
            for k in block:
                part = part + a[:, k, None] * b[k]
            acc = acc + part
        return acc.astype(np.float64)
    if sums == "truncating":
        total = acc.astype(np.float64)
        for k in columns:
            total = truncated(total + left[:, k, None] * right[k])
        return total
    for k in columns if sums == "forward" else reversed(columns):
        acc = acc + a[:, k, None] * b[k]
    return acc.astype(np.float64)


@dataclass(frozen=True)
class Pipeline:
    """One way to evaluate the contract: where E and c go, how sums run, where y is added up."""

    arithmetic: Arithmetic
    fold: Fold = "A"
    scale_at: ScaleAt = "result"
    sums: Sums = "blas"
    adding: Adding = "io"
    two_steps: bool = True  # times s, then over rho'; otherwise times c

    def store(self, values: F64 | float) -> F64:
        return round_to(round_to(values, "float32"), self.arithmetic.compute)

    def to_io(self, values: F64) -> F64:
        return round_to(values, self.arithmetic.io)

    def matmul(self, left: F64, right: F64) -> F64:
        return self.store(product(left, right, self.sums))

    def scaled(self, values: F64, adapter: Adapter, at: ScaleAt) -> F64:
        """Values times c, in compute or io, if this is the place where the pipeline does it."""
        if at != self.scale_at:
            return values
        into = self.to_io if at == "io" else self.store
        s, rho = self.store(adapter.scaling), self.store(adapter.ranknum)
        divisor = self.store(rho + self.store(1e-5))
        if self.two_steps:
            return into(into(values * s) / divisor)
        return into(values * self.store(s / divisor))

    def operands(self, adapter: Adapter) -> tuple[F64, F64, F64]:
        """A, E and B in the compute format, c applied to A or B if that is the place."""
        A, E, B = (self.store(m.astype(np.float64)) for m in (adapter.A, adapter.E, adapter.B))
        return self.scaled(A, adapter, "A"), E, self.scaled(B, adapter, "B")

    def dropped(self, x: F64, adapter: Adapter) -> F64:
        x = self.store(x)
        if adapter.keep is None:
            return x
        return self.store(x * self.store(1.0 / self.store(1.0 - adapter.p))) * adapter.keep

    def output(self, x: F64, adapters: Sequence[Adapter], base: F64) -> F64:
        """y for x (rows, in) and base (rows, out)."""
        y = base
        for adapter in adapters:
            y = self._add_delta(x, adapter, y)
        return y

    def _add_delta(self, x: F64, adapter: Adapter, y: F64) -> F64:
        A, E, B = self.operands(adapter)
        rows = self.dropped(x, adapter)
        if self.fold == "dense":
            V = self.scaled(self.matmul(B, self.store(A * E)), adapter, "hidden")
            left, right = rows, V.T
        else:
            folded = self.store(A * E) if self.fold == "A" else A
            hidden = self.matmul(rows, folded.T)
            if self.fold == "hidden":
                hidden = self.store(hidden * E.T)
            hidden = self.scaled(hidden, adapter, "hidden")
            left, right = hidden, (self.store(B * E.T) if self.fold == "B" else B).T
        late = self.scale_at in ("result", "io")
        if self.adding == "accumulator" and not late and self.fold != "dense":
            return self.to_io(product(left, right, self.sums, start=y))
        delta = self.scaled(self.matmul(left, right), adapter, "result")
        delta = self.scaled(self.to_io(delta), adapter, "io")
        return self.to_io(round_to(y + delta, "float32"))

    def gradients(
        self, x: F64, adapters: Sequence[Adapter], dout: F64, base_dx: F64
    ) -> tuple[F64, list[tuple[F64, F64, F64]]]:
        """dx (rows, in) and per adapter dA, dE, dB."""
        dx, leaves = base_dx, []
        for adapter in adapters:
            A, E, B = (self.store(m.astype(np.float64)) for m in (adapter.A, adapter.E, adapter.B))
            rows = self.dropped(x, adapter)
            late = "io" if self.scale_at == "io" else "result"
            G = self.store(dout)
            if self.scale_at in ("result", "io"):
                G = self.store(self.scaled(dout, adapter, late))
            part, dA, dE, dB = self._vjp(rows, A, E, B, G)
            if self.scale_at not in ("result", "io"):
                part, dA, dE, dB = (
                    self.scaled(g, adapter, self.scale_at) for g in (part, dA, dE, dB)
                )
            leaves.append((dA, dE, dB))
            if adapter.keep is not None:
                part = self.dropped(part, adapter)
            dx = self.to_io(round_to(dx + self.to_io(part), "float32"))
        return dx, leaves

    def _vjp(self, x: F64, A: F64, E: F64, B: F64, G: F64) -> tuple[F64, F64, F64, F64]:
        """dx, dA, dE, dB of x (A∘E)ᵀ Bᵀ, each as autograd derives them from the chosen fold."""
        if self.fold == "dense":
            folded = self.store(A * E)
            K, V = self.matmul(G.T, x), self.matmul(B, folded)
            dfolded = self.matmul(B.T, K)
            dE = self._summed(self.store(dfolded * A), axis=1)
            return self.matmul(G, V), self.store(dfolded * E), dE, self.matmul(K, folded.T)
        if self.fold == "A":
            folded = self.store(A * E)
            dhidden = self.matmul(G, B)
            dfolded = self.matmul(dhidden.T, x)
            dE = self._summed(self.store(dfolded * A), axis=1)
            dB = self.matmul(G.T, self.matmul(x, folded.T))
            return self.matmul(dhidden, folded), self.store(dfolded * E), dE, dB
        hidden = self.matmul(x, A.T)
        if self.fold == "hidden":
            dweighted = self.matmul(G, B)
            dE = self._summed(self.store(dweighted * hidden), axis=0).T
            dhidden = self.store(dweighted * E.T)
            dB = self.matmul(G.T, self.store(hidden * E.T))
        else:
            dweighted = self.matmul(G.T, hidden)  # out, r: gradient of B∘E
            dE = self._summed(self.store(dweighted * B), axis=0).T
            dhidden = self.matmul(G, self.store(B * E.T))
            dB = self.store(dweighted * E.T)
        return self.matmul(dhidden, A), self.matmul(dhidden.T, x), dE, dB

    def _summed(self, values: F64, axis: int) -> F64:
        ones = np.ones((values.shape[axis], 1))
        if axis == 1:
            return self.matmul(values, ones)
        return self.matmul(ones.T, values)


def pipelines(arithmetic: Arithmetic, sums: Sequence[Sums] = SUMS) -> list[Pipeline]:
    """Every fold by every place for c, with the orders of sums and the other choices rotating."""
    chosen = []
    for i, fold in enumerate(FOLDS):
        for j, scale_at in enumerate(SCALES):
            chosen.append(
                Pipeline(
                    arithmetic,
                    fold,
                    scale_at,
                    sums=sums[(i + j) % len(sums)],
                    adding="accumulator" if (i + j) % 2 else "io",
                    two_steps=(i + 2 * j) % 3 != 0,
                )
            )
    return chosen

"""The adapter's forward and its hand-derived vector-Jacobian product."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

__all__ = ["Adapter", "AdapterGradients", "Cache", "backward", "forward", "output"]

# Bodies follow the dtype that they are given: float32, float64, or complex128 for complex step.
Array = NDArray[Any]

RANKNUM_OFFSET = 1e-5  # AdaLoRA's guard against a ranknum of zero; part of the contract.


@dataclass(frozen=True)
class Adapter:
    """One AdaLoRA adapter over a linear layer: delta(x) = x̃ (A∘E)ᵀ Bᵀ c.

    A: (r, in). E: (r, 1). B: (out, r). All of one dtype.
    scaling: s, which is lora_alpha if that is positive, else r.
    ranknum: ρ, which starts at r and is not trained.
    keep: None without dropout, otherwise a boolean mask of x's shape, True where x survives.
    p: the dropout probability that `keep` was drawn with; survivors are multiplied by 1 / (1 - p).

    Raises ValueError where shapes do not agree or `p` is outside [0, 1).
    """

    A: Array
    E: Array
    B: Array
    scaling: float
    ranknum: float
    keep: NDArray[np.bool_] | None = None
    p: float = 0.0

    def __post_init__(self) -> None:
        if self.A.ndim != 2 or self.B.ndim != 2:
            raise ValueError(
                f"`A` must be (r, in) and `B` (out, r), got {self.A.shape}, {self.B.shape}."
            )
        rank = self.A.shape[0]
        if self.E.shape != (rank, 1) or self.B.shape[1] != rank:
            raise ValueError(
                f"`A` has {rank} rows, so `E` must be ({rank}, 1) and `B` (out, {rank}); "
                f"got {self.E.shape} and {self.B.shape}."
            )
        if not 0.0 <= self.p < 1.0:
            raise ValueError(f"`p` must be in [0, 1), got {self.p}.")

    @property
    def c(self) -> float:
        """scaling / (ranknum + 1e-5), in double precision."""
        return float(self.scaling) / (float(self.ranknum) + RANKNUM_OFFSET)

    def dropped(self, x: Array) -> Array:
        """x̃ = x∘keep / (1 - p), (..., in); its own transpose, so dx uses it too.

        Raises ValueError if `keep` has another shape than `x`.
        """
        if self.keep is None:
            return x
        if self.keep.shape != x.shape:
            raise ValueError(f"`keep` has shape {self.keep.shape}, `x` has {x.shape}.")
        return np.where(self.keep, x * (1.0 / (1.0 - self.p)), x.dtype.type(0))


class AdapterGradients(NamedTuple):
    """Gradients by `forward`'s arguments: dx (..., in), dA (r, in), dE (r, 1), dB (out, r).

    `bound_gradients` uses the same four names for `Bounded` pairs.
    """

    dx: Any
    dA: Any
    dE: Any
    dB: Any


class Cache(NamedTuple):
    """What `backward` needs of `forward`: x̃ (..., in), h = x̃ (A∘E)ᵀ (..., r), and the adapter."""

    dropped: Array
    hidden: Array
    adapter: Adapter


def forward(x: Array, adapter: Adapter) -> tuple[Array, Cache]:
    """delta = ( x̃ (A∘E)ᵀ Bᵀ ) c for x (..., in), giving delta (..., out) and a cache.

    Leading dimensions are free: none, several, or empty ones. r = 0 gives zeros.
    """
    dropped = adapter.dropped(x)  # ..., in
    hidden = dropped @ (adapter.A * adapter.E).T  # ..., r
    delta = hidden @ adapter.B.T * adapter.c  # ..., out
    return delta, Cache(dropped, hidden, adapter)


def backward(ddelta: Array, cache: Cache) -> AdapterGradients:
    """Gradients of a scalar loss, given its gradient `ddelta` (..., out) by delta.

    Write rows of all leading dimensions as one, and G for ddelta. With A' = A∘E, h = x̃ A'ᵀ and
    delta = c h Bᵀ, the differential of the loss is

        <G, d delta> = c <G, dh Bᵀ> + c <G, h dBᵀ>
                     = <P, dh> + <c Gᵀ h, dB>                with P = c G B              (rows, r)
        <P, dh>      = <P, dx̃ A'ᵀ> + <P, x̃ dA'ᵀ>
                     = <P A', dx̃> + <Q, dA'>                 with Q = Pᵀ x̃              (r, in)
        <Q, dA'>     = <Q∘E, dA> + sum_j dE_j (sum_i Q_ji A_ji)

    and dx̃ = dx∘keep / (1 - p). Hence dB = c Gᵀ h, dA = Q∘E, dE = rowsum(Q∘A) and
    dx = (P A')∘keep / (1 - p). The contract gives ranknum no gradient.
    """
    dropped, hidden, adapter = cache
    rank, features_in = adapter.A.shape
    rows = ddelta.reshape(-1, adapter.B.shape[0])  # rows, out
    flat = dropped.reshape(-1, features_in)  # rows, in

    dhidden = rows @ adapter.B * adapter.c  # rows, r
    dfolded = dhidden.T @ flat  # r, in
    dx = (dhidden @ (adapter.A * adapter.E)).reshape(dropped.shape)  # ..., in
    return AdapterGradients(
        dx=adapter.dropped(dx),
        dA=dfolded * adapter.E,
        dE=(dfolded * adapter.A).sum(axis=1, keepdims=True),
        dB=rows.T @ hidden.reshape(rows.shape[0], rank) * adapter.c,
    )


def output(base: Array, x: Array, adapters: Sequence[Adapter]) -> NDArray[np.float64]:
    """y = base + the sum of the adapters' deltas, evaluated in float64.

    base: (..., out), taken as given. x: (..., in). y: (..., out).
    """
    y = np.array(base, dtype=np.float64)
    for adapter in adapters:
        y += forward(np.asarray(x, dtype=np.float64), in_float64(adapter))[0]
    return y


def in_float64(adapter: Adapter) -> Adapter:
    """The same adapter with float64 matrices; exact, since every smaller format embeds."""
    return Adapter(
        A=adapter.A.astype(np.float64),
        E=adapter.E.astype(np.float64),
        B=adapter.B.astype(np.float64),
        scaling=adapter.scaling,
        ranknum=adapter.ranknum,
        keep=adapter.keep,
        p=adapter.p,
    )

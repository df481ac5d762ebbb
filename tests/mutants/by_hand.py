"""An honest layer whose backward is written by hand: a short method for each thing a mutant gets wrong."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from tests.mutants.honest import HonestLayer

Part = Literal["x", "A", "E", "B"]


class ByHand(HonestLayer):
    """The contract's VJP as `reference` derives it, with h = x @ (A * E).T computed again.

    dA' = c (G B).T x    dA = dA' * E    dE = rowsum(dA' * A)    dB = c G.T h    dx = c G B (A * E)
    """

    def delta(self, x: Tensor, name: str) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            A, E, B = self.triplets(name)
            c = self.factor(name)
            y: Tensor = _Update.apply(self, name, c, self.dropped(x, name), A, E, B)  # type: ignore[no-untyped-call]
            return y

    def vjp(
        self, name: str, c: Tensor, G: Tensor, x: Tensor, A: Tensor, E: Tensor, B: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """G (n, out), x (n, in) to dx (n, in), dA (r, in), dE (r, 1), dB (out, r)."""
        P = G @ B  # n, rank
        outer = P.T @ x  # rank, in
        dx = self.scaled("x", name, c) * (P @ (A * self.singular("x", E)))
        dA = self.scaled("A", name, c) * (outer * self.singular("A", E))
        dE = self.scaled("E", name, c) * (outer * A).sum(1, keepdim=True)
        dB = self.scaled("B", name, c) * (G.T @ (x @ (A * self.singular("B", E)).T))
        return dx, dA, dE, dB

    def scaled(self, part: Part, name: str, c: Tensor) -> Tensor:
        """The factor with which a gradient is scaled."""
        return c

    def singular(self, part: Part, E: Tensor) -> Tensor:
        """The singular values (r, 1) that a gradient contains."""
        return E


class _Update(torch.autograd.Function):
    """c x (A * E).T B.T; its backward asks the layer."""

    @staticmethod
    def forward(
        ctx: Any, layer: ByHand, name: str, c: Tensor, x: Tensor, A: Tensor, E: Tensor, B: Tensor
    ) -> Tensor:
        ctx.save_for_backward(x, A, E, B)
        ctx.layer, ctx.name, ctx.c = layer, name, c
        return (x @ (A * E).T) @ B.T * c

    @staticmethod
    def backward(ctx: Any, G: Tensor) -> tuple[Tensor | None, ...]:
        x, A, E, B = ctx.saved_tensors
        rows = x.reshape(x.shape[:-1].numel(), x.shape[-1])
        G = G.reshape(len(rows), len(B))
        dx, *rest = ctx.layer.vjp(ctx.name, ctx.c, G, rows, A, E, B)
        return None, None, None, dx.reshape(x.shape), *rest

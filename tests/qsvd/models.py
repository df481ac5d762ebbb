"""Small models of quantised layers, named as transformers name theirs."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from tests.qsvd.build import Kind, base_layer

WIDTH = 64


class Block(nn.Module):
    """Two projections and their sum, and a norm that is not quantised."""

    def __init__(self, linear: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.q_proj = linear()
        self.v_proj = linear()
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.norm(x + self.q_proj(x) + self.v_proj(x))
        return y


class Stack(nn.Module):
    """Blocks under `layers`, and a quantised head that calls itself the output embeddings."""

    def __init__(self, linear: Callable[[], nn.Module], depth: int = 3) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block(linear) for _ in range(depth))
        self.lm_head = linear()

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def forward(self, x: Tensor) -> Tensor:
        for block in self.layers:
            x = block(x)
        y: Tensor = self.lm_head(x)
        return y


def stack(kind: Kind = "4bit", depth: int = 3) -> Stack:
    """A stack of quantised layers, the same weights each time."""
    torch.manual_seed(0)
    return Stack(lambda: base_layer(kind, WIDTH, WIDTH, bias=False), depth)

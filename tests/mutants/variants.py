"""Honest layers: the contract evaluated in other orders and dtypes. The suite must blame none of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn.functional import linear

from conformance.port import Arithmetic, Port, load_port
from tests.mutants.by_hand import ByHand
from tests.mutants.honest import HonestLayer
from tests.mutants.mutant import over_both_bases

VARIANTS: dict[str, Port] = {}
T = TypeVar("T", bound=type[HonestLayer])


def variant(name: str, arithmetic: Arithmetic = "float32") -> Callable[[T], T]:
    """Enter an honest layer, with the arithmetic that it declares."""

    def enter(layer: T) -> T:
        VARIANTS[name] = Port(name, "0", over_both_bases(layer), arithmetic)
        return layer

    return enter


@variant("the honest layer")
class Honest(HonestLayer):
    pass


@variant("the honest layer, held to the wider bounds", "input")
class HonestWide(HonestLayer):
    pass


@variant("folds E into B")
class FoldsIntoB(HonestLayer):
    def product(self, x: Tensor, A: Tensor, E: Tensor, B: Tensor) -> Tensor:
        return linear(linear(x, A), B * E.T)


@variant("scales the hidden vector")
class ScalesHidden(HonestLayer):
    def delta(self, x: Tensor, name: str) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            A, E, B = self.triplets(name)
            hidden = linear(self.dropped(x, name), A * E) * self.factor(name)
            return linear(hidden, B)


@variant("applies E to the hidden vector")
class HiddenTimesE(HonestLayer):
    def product(self, x: Tensor, A: Tensor, E: Tensor, B: Tensor) -> Tensor:
        return linear(linear(x, A) * E[:, 0], B)


@variant("forms B @ (A * E) first")
class DenseUpdate(HonestLayer):
    def product(self, x: Tensor, A: Tensor, E: Tensor, B: Tensor) -> Tensor:
        return linear(x, B @ (A * E))


@variant("adds in fp32 and rounds once")
class RoundsOnce(HonestLayer):
    def combine(self, y: Tensor, delta: Tensor) -> Tensor:
        return (y.float() + delta).to(y.dtype)


@variant("computes in the input's dtype", "input")
class InputDtype(HonestLayer):
    """Half-precision products with fp32 accumulation, as addmm has them; c is folded into E."""

    def delta(self, x: Tensor, name: str) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            A, E, B = self.triplets(name)
            Q = (A * (E * self.factor(name))).to(x.dtype)
            dropped = self.lora_dropout[name](x)
            # fp16 could leave its range between the two products; they stay in fp32 there.
            if x.dtype == torch.float16:
                return linear(linear(dropped.float(), Q.float()), B)
            return linear(linear(dropped, Q), B.to(x.dtype))


@variant("rounds the update before it is scaled", "input")
class RoundsFactors(HonestLayer):
    def delta(self, x: Tensor, name: str) -> Tensor:
        return super().delta(x, name).to(x.dtype).float()


@variant("one product for all adapters")
class OneProduct(HonestLayer):
    def forward(self, x: Tensor) -> Tensor:
        y = self.base_output(x)
        if self.disable_adapters or not self.active_adapters:
            return y
        with torch.autocast(x.device.type, enabled=False):
            names = self.active_adapters
            parts = [self.triplets(name) for name in names]
            hidden = [
                linear(self.dropped(x, name), A * E) * self.factor(name)
                for name, (A, E, _) in zip(names, parts, strict=True)
            ]
            delta = linear(torch.cat(hidden, dim=-1), torch.cat([B for _, _, B in parts], dim=1))
            return self.combine(y, delta)


@variant("sums the inner dimension backwards, in blocks")
class Blocks(HonestLayer):
    def product(self, x: Tensor, A: Tensor, E: Tensor, B: Tensor) -> Tensor:
        Q = A * E
        pieces = zip(x.flip(-1).split(16, -1), Q.flip(-1).split(16, -1), strict=True)
        hidden: Any = sum(linear(one, q) for one, q in pieces)
        return linear(hidden, B)


@variant("differentiated by hand")
class Differentiated(ByHand):
    """A backward of its own, which computes the hidden vector again."""


@variant("computes in fp64")
class InDouble(HonestLayer):
    def delta(self, x: Tensor, name: str) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            A, E, B = (t.double() for t in self.triplets(name))
            delta = self.product(self.dropped(x, name).double(), A, E, B)
            return (delta * self.factor(name).double()).float()


@variant("goes through the rows in chunks")
class Chunks(HonestLayer):
    def product(self, x: Tensor, A: Tensor, E: Tensor, B: Tensor) -> Tensor:
        # Compiled, a loop over them would be another graph for each number of rows.
        if x.dim() < 2 or not x.shape[0] or torch.compiler.is_compiling():
            return super().product(x, A, E, B)
        return torch.cat([linear(linear(rows, A * E), B) for rows in x.split(7)])


@variant("sums outer products rank by rank")
class RankByRank(HonestLayer):
    def product(self, x: Tensor, A: Tensor, E: Tensor, B: Tensor) -> Tensor:
        delta = x.new_zeros((*x.shape[:-1], len(B)))
        for a, e, b in zip(A, E[:, 0], B.T, strict=True):
            delta = delta + ((x * a).sum(-1, keepdim=True) * e) * b
        # With no rank, A, E and B still take part in the graph.
        return delta if len(A) else super().product(x, A, E, B)


@variant("contracts with einsum")
class Einsum(HonestLayer):
    def product(self, x: Tensor, A: Tensor, E: Tensor, B: Tensor) -> Tensor:
        return torch.einsum("...i,ri,r,mr->...m", x, A, E[:, 0], B)


def _product(x: Tensor, A: Tensor, E: Tensor, B: Tensor) -> Tensor:
    return linear(linear(x, A * E), B)


_compiled = torch.compile(_product, backend="eager", dynamic=True)


@variant("compiled by torch")
class Compiled(HonestLayer):
    def product(self, x: Tensor, A: Tensor, E: Tensor, B: Tensor) -> Tensor:
        y: Tensor = _compiled(x, A, E, B)
        return y


# The layer that this project ships: one addmm, E and c folded into A, and a backward of its own.
VARIANTS["qsvd"] = load_port("qsvd")

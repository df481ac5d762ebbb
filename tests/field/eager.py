"""The two eager layers with which the field compares: as everybody writes it, and in the input's dtype."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import linear

from conformance.port import Port
from tests.mutants.honest import HonestLayer
from tests.mutants.mutant import over_both_bases


class Plain(HonestLayer):
    """Fp32 adapters on an input of any dtype: what PEFT does, and what a suite would call eager."""


class Low(HonestLayer):
    """Everything in the input's dtype, rounded after every step: flash-attention's `upcast=False`."""

    def delta(self, x: Tensor, name: str) -> Tensor:
        A, E, B = (t.to(x.dtype) for t in self.triplets(name))
        return linear(linear(x, A * E), B) * self.factor(name).to(x.dtype)


PLAIN = Port("eager", "0", over_both_bases(Plain))
LOW = Port("eager in the input's dtype", "0", over_both_bases(Low))

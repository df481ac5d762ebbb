"""A port that plays back the answers that it has learnt, and has no idea of any other."""

from typing import ClassVar

import torch

from tests.mutants import honest

__version__ = "1.0"


def _bytes(tensor: torch.Tensor) -> bytes:
    return tensor.detach().double().numpy().tobytes()


class SVDLinear4bit(honest.SVDLinear4bit):
    """Over 4-bit layers; right for every input that it met while `learning`."""

    learning: ClassVar[bool] = True
    memory: ClassVar[dict[tuple[object, ...], torch.Tensor]] = {}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        base = self.base_layer(x)
        known = (x, base, *self.lora_A.values(), *self.lora_E.values(), *self.lora_B.values())
        key = (*map(_bytes, known), base.dtype, *self.scaling.values())
        if self.learning:
            self.memory[key] = super().forward(x).detach()
        return self.memory.get(key, base)

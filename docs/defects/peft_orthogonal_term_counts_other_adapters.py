"""PEFT: the orthogonal term of adapter `a` also counts adapter `ab`, a name that contains `a`."""

import sys
import warnings
from types import SimpleNamespace

import torch
from peft import AdaLoraConfig, get_peft_model

warnings.simplefilter("ignore")  # a warning about the name `a`


class Model(torch.nn.Module):
    """One linear, and the output object with a loss that AdaLoraModel.forward looks for."""

    def __init__(self) -> None:
        super().__init__()
        self.one = torch.nn.Linear(16, 16)

    def forward(self, x: torch.Tensor) -> SimpleNamespace:
        return SimpleNamespace(loss=self.one(x).pow(2).mean())


ranks = {"total_step": 10, "init_r": 4, "target_r": 2, "target_modules": ["one"]}
model = get_peft_model(Model(), AdaLoraConfig(**ranks), "a")
x = torch.zeros(1, 16)
expected = model.base_model(x).loss.item()
model.add_adapter("ab", AdaLoraConfig(**ranks, inference_mode=True))
with torch.no_grad():
    model.base_model.model.one.lora_A["ab"].fill_(1)
observed = model.base_model(x).loss.item()
present = observed > expected + 1  # `ab` is inactive: its parameters must not matter at all

print(f"observed: {observed}")
print(f"expected: {expected}")
print("REPRODUCED" if present else "NOT REPRODUCED")
sys.exit(0 if present else 1)

"""PEFT: without a task_type, training has no orthogonal term, whatever orth_reg_weight says."""

import sys
from types import SimpleNamespace

import torch
from peft import AdaLoraConfig, get_peft_model


class Model(torch.nn.Module):
    """One linear, and the output object with a loss that AdaLoraModel.forward looks for."""

    def __init__(self) -> None:
        super().__init__()
        self.one = torch.nn.Linear(16, 16)

    def forward(self, x: torch.Tensor) -> SimpleNamespace:
        return SimpleNamespace(loss=self.one(x).pow(2).mean())


config = AdaLoraConfig(total_step=10, init_r=4, orth_reg_weight=100, target_modules=["one"])
model = get_peft_model(Model(), config).train()
x = torch.randn(3, 16)
loss = model.base_model.model(x).loss.item()
observed = model(x).loss.item() - loss
expected = model.base_model(x).loss.item() - loss  # AdaLoraModel.forward, called directly
present = observed == 0 and expected > 1

print(f"observed: {observed:.2f} is added to the loss")
print(f"expected: {expected:.2f}")
print("REPRODUCED" if present else "NOT REPRODUCED")
sys.exit(0 if present else 1)

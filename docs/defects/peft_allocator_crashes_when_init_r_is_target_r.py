"""PEFT: update_and_allocate raises `kthvalue` when init_r equals target_r."""

import sys
from types import SimpleNamespace

import torch
from peft import AdaLoraConfig, get_peft_model


class Model(torch.nn.Module):
    """Two linears, and the output object with a loss that AdaLoraModel.forward looks for."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = torch.nn.Linear(16, 16), torch.nn.Linear(16, 16)

    def forward(self, x: torch.Tensor) -> SimpleNamespace:
        return SimpleNamespace(loss=self.two(self.one(x)).pow(2).mean())


config = AdaLoraConfig(total_step=10, init_r=4, target_r=4, target_modules=["one", "two"])
model = get_peft_model(Model(), config)
model(torch.randn(3, 16)).loss.backward()
try:
    model.base_model.update_and_allocate(5)
    observed = "no error"
except RuntimeError as error:
    observed = str(error)
expected = "no error: nothing is to be pruned"
present = "kthvalue" in observed

print(f"observed: {observed}")
print(f"expected: {expected}")
print("REPRODUCED" if present else "NOT REPRODUCED")
sys.exit(0 if present else 1)

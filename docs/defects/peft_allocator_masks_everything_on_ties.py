"""PEFT: a step whose gradients are all zero masks every singular value."""

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


config = AdaLoraConfig(total_step=10, init_r=4, target_r=2, target_modules=["one", "two"])
model = get_peft_model(Model(), config)
for name, parameter in model.named_parameters():
    if "lora_E" in name:
        torch.nn.init.ones_(parameter)
model(torch.randn(3, 16)).loss.backward()
for parameter in model.parameters():
    if parameter.grad is not None:
        parameter.grad.zero_()
model.base_model.update_and_allocate(5)
observed = sum(int(p.count_nonzero()) for n, p in model.named_parameters() if "lora_E" in n)
expected = "some of 8: the budget at step 5 is between 4 and 8"
present = observed == 0

print(f"observed: {observed}")
print(f"expected: {expected}")
print("REPRODUCED" if present else "NOT REPRODUCED")
sys.exit(0 if present else 1)

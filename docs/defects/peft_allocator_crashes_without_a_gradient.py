"""PEFT: update_and_allocate raises when a layer took no part in the step (dropped, or an idle expert)."""

import sys

import torch
from peft import AdaLoraConfig, get_peft_model


class Experts(torch.nn.Module):
    """Two linears, of which the second is idle."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = torch.nn.Linear(16, 16), torch.nn.Linear(16, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.one(x)


config = AdaLoraConfig(total_step=10, init_r=4, target_r=2, target_modules=["one", "two"])
model = get_peft_model(Experts(), config)
model(torch.randn(3, 16)).sum().backward()
try:
    model.base_model.update_and_allocate(1)
    observed = "no error"
except TypeError as error:
    observed = f"TypeError: {error}"
expected = "no error"
present = observed != expected

print(f"observed: {observed}")
print(f"expected: {expected}")
print("REPRODUCED" if present else "NOT REPRODUCED")
sys.exit(0 if present else 1)

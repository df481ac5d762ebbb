"""PEFT: with adapters `a` and `ab`, update_and_allocate for `a` also meets `ab`, and raises."""

import sys
import warnings
from types import SimpleNamespace

import torch
from peft import AdaLoraConfig, get_peft_model

warnings.simplefilter("ignore")  # a warning about the name `a`


class Model(torch.nn.Module):
    """Two linears, and the output object with a loss that AdaLoraModel.forward looks for."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = torch.nn.Linear(16, 16), torch.nn.Linear(16, 16)

    def forward(self, x: torch.Tensor) -> SimpleNamespace:
        return SimpleNamespace(loss=self.two(self.one(x)).pow(2).mean())


ranks = {"total_step": 10, "init_r": 4, "target_r": 2, "target_modules": ["one"]}
model = get_peft_model(Model(), AdaLoraConfig(**ranks), "a")
model.add_adapter("ab", AdaLoraConfig(**ranks, inference_mode=True))
model(torch.randn(3, 16)).loss.backward()
try:
    model.base_model.update_and_allocate(5)
    observed = "no error"
except TypeError as error:
    observed = f"TypeError: {error}"
expected = "no error: `ab` is frozen and has no gradient"
present = observed.startswith("TypeError")

print(f"observed: {observed}")
print(f"expected: {expected}")
print("REPRODUCED" if present else "NOT REPRODUCED")
sys.exit(0 if present else 1)

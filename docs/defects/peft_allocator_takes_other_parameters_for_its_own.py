"""PEFT: an adapter whose name contains `lora_`, or a module with such a name, crashes the allocator."""

import sys
import warnings

import torch
from peft import AdaLoraConfig, get_peft_model

warnings.simplefilter("ignore")  # a warning about such names


class Model(torch.nn.Module):
    """One linear, in a module of a given name."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name
        self.add_module(name, torch.nn.ModuleDict({"q_proj": torch.nn.Linear(16, 16)}))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return getattr(self, self.name)["q_proj"](x)


def allocate(adapter_name: str, module_name: str) -> str:
    """What update_and_allocate says after one backward pass."""
    config = AdaLoraConfig(total_step=10, target_modules=["q_proj"])
    model = get_peft_model(Model(module_name), config, adapter_name=adapter_name)
    model(torch.randn(3, 16)).pow(2).sum().backward()
    try:
        model.base_model.update_and_allocate(0)
    except TypeError as error:
        return f"TypeError: {error}"
    return "allocated"


named = (("default", "block"), ("my_lora_1", "block"), ("default", "lora_block"))
observed = {" in ".join(names): allocate(*names) for names in named}
expected = dict.fromkeys(observed, "allocated")
first, *others = observed.values()
present = first == "allocated" and all(o.startswith("TypeError") for o in others)

print(f"observed: {observed}")
print(f"expected: {expected}")
print("REPRODUCED" if present else "NOT REPRODUCED")
sys.exit(0 if present else 1)

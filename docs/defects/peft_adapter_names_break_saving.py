"""PEFT: once ranks are pruned, an adapter whose name occurs in a module's name cannot be saved."""

import sys
import tempfile
import warnings

import torch
from peft import AdaLoraConfig, get_peft_model

warnings.simplefilter("ignore")  # a warning about names that `lora_` contains


class Attention(torch.nn.Module):
    """A linear with a name that is common in transformers."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj = torch.nn.Linear(16, 16)


class Model(torch.nn.Module):
    """`self_attn.q_proj`, and no more."""

    def __init__(self) -> None:
        super().__init__()
        self.self_attn = Attention()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.self_attn.q_proj(x)


def save(name: str) -> str:
    """What save_pretrained says of an adapter of this name after two allocations."""
    schedule = {"init_r": 4, "target_r": 2, "tinit": 0, "tfinal": 1, "total_step": 10}
    config = AdaLoraConfig(**schedule, target_modules=["q_proj"])
    model = get_peft_model(Model(), config, adapter_name=name)
    torch.nn.init.ones_(model.base_model.model.self_attn.q_proj.lora_E[name])
    for step in range(3):
        model(torch.randn(3, 16)).pow(2).sum().backward()
        model.base_model.update_and_allocate(step)
    with tempfile.TemporaryDirectory() as folder:
        try:
            model.save_pretrained(folder)
        except KeyError as error:
            return f"KeyError: {error}"
    return "saved"


names = ("default", "lora", "a", "self", "q", "attn")
observed = {name: save(name) for name in names}
expected = dict.fromkeys(names, "saved")
present = observed["default"] == "saved" and list(observed.values()).count("saved") == 1

print(f"observed: {observed}")
print(f"expected: {expected}")
print("REPRODUCED" if present else "NOT REPRODUCED")
sys.exit(0 if present else 1)

"""PEFT: training that resumes from a checkpoint crashes in update_and_allocate, in three ways."""

import sys
import tempfile
import warnings
from collections.abc import Iterable

import torch
from peft import AdaLoraConfig, PeftModel, get_peft_model

warnings.simplefilter("ignore")  # of empty tensors, which r = 0 makes


class Model(torch.nn.Module):
    """Two linears."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = torch.nn.Linear(16, 16), torch.nn.Linear(16, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.two(self.one(x))


def train(model: PeftModel, steps: Iterable[int]) -> None:
    """One backward and one allocation for each step."""
    for step in steps:
        model(torch.randn(3, 16)).pow(2).sum().backward()
        model.base_model.update_and_allocate(step)


def resume(step: int) -> str:
    """What the first step of a run does that goes on from the checkpoint before `step`."""
    torch.manual_seed(0)
    schedule = {"init_r": 4, "target_r": 1, "tinit": 0, "tfinal": 2, "total_step": 10}
    model = get_peft_model(Model(), AdaLoraConfig(**schedule, target_modules=["one", "two"]))
    for layer in (model.base_model.model.one, model.base_model.model.two):
        torch.nn.init.ones_(layer.lora_E["default"])
    train(model, range(step))
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        resumed = PeftModel.from_pretrained(Model(), folder, is_trainable=True)
    try:
        train(resumed, [step])
    except (RuntimeError, KeyError) as error:
        return f"{type(error).__name__}: {str(error).partition('. ')[0]}"
    return "no error"


observed = {"pruning": resume(7), "last allocation": resume(8), "final phase": resume(9)}
expected = dict.fromkeys(observed, "no error")
present = "no error" not in observed.values()

print(f"observed: {observed}")
print(f"expected: {expected}")
print("REPRODUCED" if present else "NOT REPRODUCED")
sys.exit(0 if present else 1)

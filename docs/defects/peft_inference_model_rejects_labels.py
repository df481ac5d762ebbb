"""PEFT: a model whose only adapter is for inference raises as soon as its output has a loss."""

import sys
from types import SimpleNamespace

import torch
from peft import AdaLoraConfig, TaskType, get_peft_model


class Model(torch.nn.Module):
    """One linear, with what PeftModelForFeatureExtraction asks of a model, and a loss."""

    config = SimpleNamespace(use_return_dict=True)

    def __init__(self) -> None:
        super().__init__()
        self.one = torch.nn.Linear(16, 16)

    def forward(self, input_ids: torch.Tensor, **_: object) -> SimpleNamespace:
        return SimpleNamespace(loss=self.one(input_ids).pow(2).mean())


config = AdaLoraConfig(
    task_type=TaskType.FEATURE_EXTRACTION,
    inference_mode=True,
    total_step=10,
    target_modules=["one"],
)
base = Model()
x = torch.ones(3, 16)
expected = f"loss {base(x).loss.item():.4f}"
try:
    observed = f"loss {get_peft_model(base, config).eval()(x).loss.item():.4f}"
except AttributeError as error:
    observed = f"AttributeError: {error}"
present = observed.startswith("AttributeError")

print(f"observed: {observed}")
print(f"expected: {expected}")
print("REPRODUCED" if present else "NOT REPRODUCED")
sys.exit(0 if present else 1)

"""PEFT: in eval mode, and with the adapters disabled, the loss still contains the orthogonal term."""

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
    task_type=TaskType.FEATURE_EXTRACTION, total_step=10, init_r=4, target_modules=["one"]
)
x = torch.randn(3, 16)
base = Model()
expected = base(x).loss.item()  # a fresh adapter changes nothing
model = get_peft_model(base, config).eval()
with torch.no_grad():
    in_eval = model(x).loss.item()
    with model.disable_adapter():
        disabled = model(x).loss.item()
present = min(in_eval, disabled) > expected + 0.1

print(f"observed: eval {in_eval:.4f}, adapters disabled {disabled:.4f}")
print(f"expected: eval {expected:.4f}, adapters disabled {expected:.4f}")
print("REPRODUCED" if present else "NOT REPRODUCED")
sys.exit(0 if present else 1)

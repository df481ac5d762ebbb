"""PEFT: training that resumes from a pruned checkpoint prunes it again, and saves an unloadable file."""

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


def ranks_after(model: PeftModel, steps: Iterable[int]) -> int:
    """Singular values that are not 0 after these steps; the budget at step 7 and after is 4."""
    for step in steps:
        model(torch.randn(3, 16)).pow(2).sum().backward()
        model.base_model.update_and_allocate(step)
    return sum(int((p != 0).sum()) for n, p in model.named_parameters() if "lora_E" in n)


torch.manual_seed(0)
schedule = {"init_r": 4, "target_r": 2, "tinit": 0, "tfinal": 1, "total_step": 10}
model = get_peft_model(Model(), AdaLoraConfig(**schedule, target_modules=["one", "two"]))
for layer in (model.base_model.model.one, model.base_model.model.two):
    torch.nn.init.ones_(layer.lora_E["default"])
with tempfile.TemporaryDirectory() as folder:
    before = ranks_after(model, range(8))
    model.save_pretrained(folder)
    resumed = PeftModel.from_pretrained(Model(), folder, is_trainable=True)
    after = ranks_after(resumed, [8])
    resumed.save_pretrained(folder)
    try:
        PeftModel.from_pretrained(Model(), folder)
        loading = "loads"
    except IndexError as error:
        loading = f"IndexError: {error}"
observed = (before, after, loading)
expected = (4, 4, "loads")
present = before == 4 and (after < 4 or loading != "loads")

print("ranks when saved, ranks after the first step of the resumed run, its own checkpoint:")
print(f"observed: {observed}")
print(f"expected: {expected}")
print("REPRODUCED" if present else "NOT REPRODUCED")
sys.exit(0 if present else 1)

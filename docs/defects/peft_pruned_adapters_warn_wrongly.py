"""PEFT: a pruned adapter that is sound warns of ignored ranks when it loads, of lost shards when it saves."""

import sys
import tempfile
import warnings

import torch
from peft import AdaLoraConfig, PeftModel, get_peft_model


def base() -> torch.nn.Module:
    """Two linears."""
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(16, 16), torch.nn.Linear(16, 16))


schedule = {"init_r": 4, "target_r": 1, "tinit": 0, "tfinal": 1, "total_step": 10}
model = get_peft_model(base(), AdaLoraConfig(**schedule, target_modules=["0", "1"]))
for layer in model.base_model.model:
    torch.nn.init.ones_(layer.lora_E["default"])
for step in range(8):
    model(torch.randn(3, 16)).pow(2).sum().backward()
    model.base_model.update_and_allocate(step)
with tempfile.TemporaryDirectory() as folder:
    with warnings.catch_warnings(record=True) as saving:
        warnings.simplefilter("always")
        model.save_pretrained(folder)
    with warnings.catch_warnings(record=True) as loading:
        warnings.simplefilter("always")
        loaded = PeftModel.from_pretrained(base(), folder)
x = torch.randn(3, 16)
sound = torch.equal(loaded(x), model(x))
ranks = [layer.r["default"] for layer in loaded.base_model.model]
ignored = any("were ignored" in str(w.message) for w in loading)
incomplete = any("invalid shape" in str(w.message) for w in saving)
observed = {"equal": sound, "ranks": ranks, "ignored": ignored, "incomplete": incomplete}
expected = {"equal": True, "ranks": ranks, "ignored": False, "incomplete": False}
present = sound and 0 in ranks and ignored and incomplete

print(
    "outputs equal, ranks, a warning of an ignored rank_pattern, a warning of incomplete tensors:"
)
print(f"observed: {observed}")
print(f"expected: {expected}")
print("REPRODUCED" if present else "NOT REPRODUCED")
sys.exit(0 if present else 1)

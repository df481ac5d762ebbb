"""PEFT: a 4-bit linear in a model without `is_loaded_in_4bit` becomes a plain SVDLinear."""

import sys

import bitsandbytes as bnb
import torch
from peft import AdaLoraConfig, get_peft_model

model = torch.nn.Sequential(bnb.nn.Linear4bit(64, 64, bias=False).to("cpu"))
config = AdaLoraConfig(total_step=10, init_r=4, target_r=2, target_modules=["0"])
layer = get_peft_model(model, config).base_model.model[0]
try:
    layer.merge()
    merged = "merged"
except (NotImplementedError, RuntimeError) as error:
    merged = f"{type(error).__name__}: {error}"
observed = (type(layer).__name__, merged)
expected = ("SVDLinear4bit", "NotImplementedError with a message")
present = observed[0] == "SVDLinear" and "must match the size" in merged

print(f"observed: {observed}")
print(f"expected: {expected}")
print("REPRODUCED" if present else "NOT REPRODUCED")
sys.exit(0 if present else 1)

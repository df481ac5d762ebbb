"""PEFT: lora_alpha nan silently becomes r, and lora_alpha inf makes a fresh adapter nan."""

import sys

import bitsandbytes as bnb
import torch
from peft import AdaLoraConfig
from peft.tuners.adalora.bnb import SVDLinear4bit, SVDLinear8bitLt

LAYERS = {
    SVDLinear8bitLt: lambda: bnb.nn.Linear8bitLt(64, 64, bias=False, has_fp16_weights=False),
    SVDLinear4bit: lambda: bnb.nn.Linear4bit(64, 64, bias=False),
}
config = AdaLoraConfig(total_step=10)

observed = {}
for layer_class, make_base in LAYERS.items():
    nan = layer_class(make_base().to("cpu"), "default", config, r=4, lora_alpha=float("nan"))
    inf = layer_class(make_base().to("cpu"), "default", config, r=4, lora_alpha=float("inf"))
    y = inf(torch.ones(1, 64))
    observed[layer_class.__name__] = (nan.scaling["default"], y.isnan().all().item())
expected = "ValueError: alpha must be a finite number"
present = all(value == (4.0, True) for value in observed.values())

print(f"observed: {observed}")
print(f"expected: {expected}")
print("REPRODUCED" if present else "NOT REPRODUCED")
sys.exit(0 if present else 1)

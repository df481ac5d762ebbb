"""PEFT: after `.half()` SVDLinear4bit forms A * E in float16, where it becomes zero."""

import sys

import bitsandbytes as bnb
import torch
from peft import AdaLoraConfig
from peft.tuners.adalora.bnb import SVDLinear4bit

config = AdaLoraConfig(total_step=10)
base = bnb.nn.Linear4bit(64, 64, bias=False, quant_type="nf4").to("cpu")

layer = SVDLinear4bit(base, "default", config, r=1).half()
with torch.no_grad():
    layer.lora_A["default"].fill_(1e-4)
    layer.lora_E["default"].fill_(1e-4)
    layer.lora_B["default"].fill_(1000)
    x = torch.ones(1, 64, dtype=torch.float16)
    observed = (layer(x) - base(x)).abs().max().item()
expected = 64 * 1e-8 * 1000
present = observed == 0

print(f"observed: {observed}")
print(f"expected: {expected}")
print("REPRODUCED" if present else "NOT REPRODUCED")
sys.exit(0 if present else 1)

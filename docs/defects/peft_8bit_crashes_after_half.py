"""PEFT: SVDLinear8bitLt raises on its first forward after `.half()` or `.to(torch.bfloat16)`."""

import sys

import bitsandbytes as bnb
import torch
from peft import AdaLoraConfig
from peft.tuners.adalora.bnb import SVDLinear8bitLt

config = AdaLoraConfig(total_step=10)

observed = {}
for dtype in (torch.float16, torch.bfloat16):
    base = bnb.nn.Linear8bitLt(64, 64, bias=False, has_fp16_weights=False).to("cpu")
    layer = SVDLinear8bitLt(base, "default", config, r=4).to(dtype)
    try:
        observed[dtype] = layer(torch.randn(2, 64, dtype=dtype)).dtype
    except RuntimeError as error:
        observed[dtype] = f"RuntimeError: {error}"
expected = "an output of the base layer's dtype, as SVDLinear4bit gives"
present = all("same dtype" in str(result) for result in observed.values())

print(f"observed: {observed}")
print(f"expected: {expected}")
print("REPRODUCED" if present else "NOT REPRODUCED")
sys.exit(0 if present else 1)

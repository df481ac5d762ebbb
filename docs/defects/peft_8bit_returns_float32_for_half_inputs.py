"""PEFT: SVDLinear8bitLt returns float32 where its base layer returns half precision."""

import sys

import bitsandbytes as bnb
import torch
from peft import AdaLoraConfig
from peft.tuners.adalora.bnb import SVDLinear8bitLt

config = AdaLoraConfig(total_step=10)

observed, expected = [], []
for dtype in (torch.bfloat16, torch.float16):
    for training in (True, False):
        base = bnb.nn.Linear8bitLt(64, 64, bias=False, has_fp16_weights=False).to("cpu")
        layer = SVDLinear8bitLt(base, "default", config, r=4).train(training)
        x = torch.randn(2, 64, dtype=dtype)
        observed.append(layer(x).dtype)
        expected.append(base(x).dtype)
# Which of the two dtypes is nobody's choice: `ranknum` is a float32 tensor of shape (1,), so the
# division by it promotes, and `result + output` keeps the wider one.
present = observed == [torch.float32] * 4 and expected != observed

print(f"observed: {observed}")
print(f"expected: {expected}")
print("REPRODUCED" if present else "NOT REPRODUCED")
sys.exit(0 if present else 1)

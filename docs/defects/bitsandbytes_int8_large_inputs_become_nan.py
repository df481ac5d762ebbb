"""bitsandbytes: Linear8bitLt in eval returns nan for |x| >= 65520 at threshold 0."""

import sys

import bitsandbytes as bnb
import torch

layer = bnb.nn.Linear8bitLt(64, 64, bias=False, has_fp16_weights=False).to("cpu")

observed = {}
for training in (True, False):
    for largest in (65519.0, 65520.0):  # 65520 is the first float32 that rounds to inf in float16
        x = torch.zeros(1, 64)
        x[0, 0] = largest
        finite = layer.train(training)(x).isfinite().all().item()
        observed["train" if training else "eval", largest] = finite
expected = "finite in all four cases: inputs, weights and true outputs are"
present = [case for case, finite in observed.items() if not finite] == [("eval", 65520.0)]

print(f"observed: {observed}")
print(f"expected: {expected}")
print("REPRODUCED" if present else "NOT REPRODUCED")
sys.exit(0 if present else 1)

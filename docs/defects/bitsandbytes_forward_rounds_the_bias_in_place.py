"""bitsandbytes: one half-precision forward rounds the bias of either layer for good."""

import sys

import bitsandbytes as bnb
import torch

layers = {
    "Linear8bitLt": bnb.nn.Linear8bitLt(64, 64, has_fp16_weights=False),
    "Linear4bit": bnb.nn.Linear4bit(64, 64),
}
observed = {}
for name, layer in layers.items():
    layer = layer.to("cpu")
    before = layer.bias.detach().clone()
    for dtype in (torch.bfloat16, torch.float32):
        layer(torch.randn(2, 64, dtype=dtype))
    observed[name] = (layer.bias.detach().float() - before).abs().max().item()
expected = 0.0
present = all(change > 0 for change in observed.values())

print(f"observed: {observed}")
print(f"expected: {expected}")
print("REPRODUCED" if present else "NOT REPRODUCED")
sys.exit(0 if present else 1)

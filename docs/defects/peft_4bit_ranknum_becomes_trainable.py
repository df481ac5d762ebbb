"""PEFT: ranknum is trainable, and drifts, when compute_dtype is bfloat16 or float16."""

import sys

import bitsandbytes as bnb
import torch
from peft import AdaLoraConfig
from peft.tuners.adalora.bnb import SVDLinear4bit

config = AdaLoraConfig(total_step=10)

observed = {}
for dtype in (torch.float32, torch.bfloat16, torch.float16):
    torch.manual_seed(0)
    base = bnb.nn.Linear4bit(64, 64, bias=False, compute_dtype=dtype).to("cpu")
    layer = SVDLinear4bit(base, "default", config, r=6, lora_alpha=16)
    torch.nn.init.normal_(layer.lora_E["default"])
    trainable = layer.ranknum["default"].requires_grad
    optimizer = torch.optim.Adam(
        [p for p in layer.parameters() if p.requires_grad], lr=0.02, eps=1e-4
    )
    for _ in range(20):
        optimizer.zero_grad()
        layer(torch.randn(8, 64)).pow(2).mean().backward()
        optimizer.step()
    observed[dtype] = (trainable, layer.ranknum["default"].item())
expected = "(False, 6.0) for every compute_dtype"
half = (observed[torch.bfloat16], observed[torch.float16])
present = observed[torch.float32] == (False, 6.0) and all(t and v != 6 for t, v in half)

print(f"observed: {observed}")
print(f"expected: {expected}")
print("REPRODUCED" if present else "NOT REPRODUCED")
sys.exit(0 if present else 1)

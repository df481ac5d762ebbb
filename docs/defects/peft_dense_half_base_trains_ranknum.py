"""PEFT: over a dense bf16 or fp16 base, ranknum is trainable, though lora_A is fp32 again."""

import sys

import torch
from peft import AdaLoraConfig, get_peft_model

observed = {}
for dtype in (torch.float32, torch.bfloat16, torch.float16):
    base = torch.nn.Sequential(torch.nn.Linear(16, 16)).to(dtype)
    config = AdaLoraConfig(total_step=10, init_r=6, target_modules=["0"])
    layer = get_peft_model(base, config).base_model.model[0]
    ranknum = layer.ranknum["default"]
    observed[str(dtype)] = (str(layer.lora_A["default"].dtype), ranknum.requires_grad)
expected = dict.fromkeys(observed, ("torch.float32", False))
present = [trainable for _, trainable in observed.values()] == [False, True, True]

print("dtype of lora_A, ranknum is trainable:")
print(f"observed: {observed}")
print(f"expected: {expected}")
print("REPRODUCED" if present else "NOT REPRODUCED")
sys.exit(0 if present else 1)

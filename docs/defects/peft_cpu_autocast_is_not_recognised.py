"""PEFT: inside torch.autocast('cpu') both layers behave as if autocast were off."""

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
    base = make_base().to("cpu")
    layer = layer_class(base, "default", config, r=4)
    widened = []
    layer.lora_dropout["default"].register_forward_pre_hook(
        lambda _, args, seen=widened: seen.append(args[0])
    )
    x = torch.randn(2, 64).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
        flags = torch.is_autocast_enabled(), torch.is_autocast_enabled("cpu")
        # Whether autocast is on decides if x is copied to fp32 before products that are bf16.
        observed[layer_class.__name__] = (flags, base(x).dtype, y.dtype, widened[0].dtype)
expected = "x stays bfloat16 in the adapter path, and y has the base output's dtype"
present = all(result[0] == (False, True) for result in observed.values())
present &= all(result[3] == torch.float32 for result in observed.values())
present &= observed["SVDLinear8bitLt"][1:3] == (torch.bfloat16, torch.float32)

print(f"observed: {observed}")
print(f"expected: {expected}")
print("REPRODUCED" if present else "NOT REPRODUCED")
sys.exit(0 if present else 1)

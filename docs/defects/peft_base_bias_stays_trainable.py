"""PEFT: the constructor freezes the base weight, not the base bias."""

import sys

import bitsandbytes as bnb
import torch
from peft import AdaLoraConfig
from peft.tuners.adalora.bnb import SVDLinear4bit, SVDLinear8bitLt

config = AdaLoraConfig(total_step=10)

bases = {
    SVDLinear8bitLt: bnb.nn.Linear8bitLt(64, 64, has_fp16_weights=False),
    SVDLinear4bit: bnb.nn.Linear4bit(64, 64),
}
observed = {}
for layer_class, base in bases.items():
    layer = layer_class(base.to("cpu"), "default", config, r=4)
    layer(torch.randn(2, 64)).sum().backward()
    bias = layer.base_layer.bias
    observed[layer_class.__name__] = (bias.requires_grad, bias.grad is not None)
expected = (False, False)
present = all(value == (True, True) for value in observed.values())

print(f"observed: {observed}")
print(f"expected: {expected}")
print("REPRODUCED" if present else "NOT REPRODUCED")
sys.exit(0 if present else 1)

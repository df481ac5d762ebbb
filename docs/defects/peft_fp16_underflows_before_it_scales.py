"""PEFT: both layers return a zero delta in float16 where the true one is 1e-3."""

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
    layer = layer_class(base, "default", config, r=1, lora_alpha=100_000)
    with torch.no_grad():
        layer.lora_A["default"].fill_(1 / 64)
        layer.lora_E["default"].fill_(1)
        layer.lora_B["default"].fill_(1e-8)  # a third of fp16's smallest subnormal number, 6e-8
        x = torch.ones(1, 64, dtype=torch.float16)
        observed[layer_class.__name__] = (layer(x).float() - base(x).float()).abs().max().item()
expected = 1e-8 * 100_000 / (1 + 1e-5)
present = all(value == 0 for value in observed.values())

print(f"observed: {observed}")
print(f"expected: {expected}")
print("REPRODUCED" if present else "NOT REPRODUCED")
sys.exit(0 if present else 1)

"""PEFT: use_rslora and alpha_pattern are accepted and change nothing."""

import sys

import bitsandbytes as bnb
from peft import AdaLoraConfig
from peft.tuners.adalora.bnb import SVDLinear4bit, SVDLinear8bitLt

LAYERS = {
    SVDLinear8bitLt: lambda: bnb.nn.Linear8bitLt(64, 64, bias=False, has_fp16_weights=False),
    SVDLinear4bit: lambda: bnb.nn.Linear4bit(64, 64, bias=False),
}

config = AdaLoraConfig(total_step=10, use_rslora=True, alpha_pattern={".*": 3})
observed = {}
for layer_class, make_base in LAYERS.items():
    layer = layer_class(make_base().to("cpu"), "default", config, r=16, lora_alpha=16)
    observed[layer_class.__name__] = (layer.scaling["default"], dict(layer.use_rslora))
expected = "ValueError, or a scaling other than the plain alpha (16)"
present = all(value == (16, {}) for value in observed.values())

print(f"observed: {observed}")
print(f"expected: {expected}")
print("REPRODUCED" if present else "NOT REPRODUCED")
sys.exit(0 if present else 1)

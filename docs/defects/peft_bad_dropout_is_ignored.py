"""PEFT: a negative or nan lora_dropout silently means no dropout."""

import sys

import bitsandbytes as bnb
from peft import AdaLoraConfig
from peft.tuners.adalora.bnb import SVDLinear4bit, SVDLinear8bitLt

LAYERS = {
    SVDLinear8bitLt: lambda: bnb.nn.Linear8bitLt(64, 64, bias=False, has_fp16_weights=False),
    SVDLinear4bit: lambda: bnb.nn.Linear4bit(64, 64, bias=False),
}

observed = {}
for layer_class, make_base in LAYERS.items():
    for rate in (-0.5, float("nan"), 1.5):
        config = AdaLoraConfig(total_step=10, lora_dropout=rate)
        try:
            layer = layer_class(make_base().to("cpu"), "default", config, r=4)
            observed[layer_class.__name__, rate] = type(layer.lora_dropout["default"]).__name__
        except ValueError:
            observed[layer_class.__name__, rate] = "ValueError"  # torch refuses 1.5
expected = "ValueError for all three"
present = list(observed.values()) == ["Identity", "Identity", "ValueError"] * 2

print(f"observed: {observed}")
print(f"expected: {expected}")
print("REPRODUCED" if present else "NOT REPRODUCED")
sys.exit(0 if present else 1)

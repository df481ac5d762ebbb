"""PEFT: a misspelt keyword, or lora_dropout as one, is accepted and has no effect."""

import sys

import bitsandbytes as bnb
from peft import AdaLoraConfig
from peft.tuners.adalora.bnb import SVDLinear4bit, SVDLinear8bitLt

LAYERS = {
    SVDLinear8bitLt: lambda: bnb.nn.Linear8bitLt(64, 64, bias=False, has_fp16_weights=False),
    SVDLinear4bit: lambda: bnb.nn.Linear4bit(64, 64, bias=False),
}
config = AdaLoraConfig(total_step=10)

observed = {}
for layer_class, make_base in LAYERS.items():
    misspelt = layer_class(make_base().to("cpu"), "default", config, r=4, lora_alhpa=7)
    dropout = layer_class(make_base().to("cpu"), "default", config, r=4, lora_dropout=0.5)
    observed[layer_class.__name__] = (
        misspelt.scaling["default"],
        type(dropout.lora_dropout["default"]).__name__,
    )
expected = "TypeError for lora_alhpa=7; Dropout(p=0.5)"
present = all(value == (1, "Identity") for value in observed.values())

print(f"observed: {observed}")
print(f"expected: {expected}")
print("REPRODUCED" if present else "NOT REPRODUCED")
sys.exit(0 if present else 1)

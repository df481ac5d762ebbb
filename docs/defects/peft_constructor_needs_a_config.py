"""PEFT: the layers' constructor and update_layer want a config object (since 0.19.0)."""

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
    try:
        layer_class(make_base().to("cpu"), "default", r=4, lora_alpha=16, lora_dropout=0.1)
        observed[layer_class.__name__] = "accepted"
    except TypeError as error:
        observed[layer_class.__name__] = str(error)
    layer = layer_class(make_base().to("cpu"), "default", config, r=4)
    try:
        layer.update_layer("second", 4, 16, 0.1, True)
        observed[layer_class.__name__, "update_layer"] = "accepted"
    except TypeError as error:
        observed[layer_class.__name__, "update_layer"] = str(error)
expected = "accepted, as up to 0.18.1"
present = all("argument" in message for message in observed.values())

print(f"observed: {observed}")
print(f"expected: {expected}")
print("REPRODUCED" if present else "NOT REPRODUCED")
sys.exit(0 if present else 1)

"""PEFT: update_layer with a taken name throws the trained adapter away without a word."""

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
    layer = layer_class(make_base().to("cpu"), "default", config, r=4)
    torch.nn.init.normal_(layer.lora_E["default"])
    trained = layer.lora_E["default"]
    try:
        layer.update_layer("default", 4, 1, config=config)
    except ValueError as error:
        observed[layer_class.__name__] = repr(error)
        continue
    # The optimizer still holds the old tensor, so nothing that it does reaches the layer.
    kept = layer.lora_E["default"] is trained
    observed[layer_class.__name__] = (kept, layer.lora_E["default"].abs().sum().item())
expected = "ValueError, or the trained adapter kept"
present = all(value == (False, 0.0) for value in observed.values())

print(f"observed: {observed}")
print(f"expected: {expected}")
print("REPRODUCED" if present else "NOT REPRODUCED")
sys.exit(0 if present else 1)

"""PEFT: set_adapter with a name that does not exist turns every adapter off."""

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
    x = torch.randn(2, 64)
    try:
        layer.set_adapter("defualt")
    except (KeyError, ValueError) as error:
        observed[layer_class.__name__] = repr(error)
        continue
    off = torch.equal(layer(x), layer.base_layer(x))
    observed[layer_class.__name__] = (off, layer.lora_E["default"].requires_grad)
expected = "KeyError or ValueError that lists the adapters there are"
present = all(value == (True, False) for value in observed.values())

print(f"observed: {observed}")
print(f"expected: {expected}")
print("REPRODUCED" if present else "NOT REPRODUCED")
sys.exit(0 if present else 1)

"""PEFT: update_layer and set_adapter turn gradients on in a layer that is disabled."""

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
    states = []
    for touch in ("update_layer", "set_adapter"):
        layer = layer_class(make_base().to("cpu"), "default", config, r=4)
        layer.enable_adapters(False)
        if touch == "update_layer":
            layer.update_layer("second", 4, 1, config=config)
        else:
            layer.set_adapter("default")
        states.append((layer.disable_adapters, layer.lora_E["default"].requires_grad))
    observed[layer_class.__name__] = states
expected = [(True, False), (True, False)]
present = all(value == [(True, True), (True, True)] for value in observed.values())

print(f"observed: {observed}")
print(f"expected: {expected}")
print("REPRODUCED" if present else "NOT REPRODUCED")
sys.exit(0 if present else 1)

"""PEFT: the layer keeps the caller's list, so changing it later changes the layer."""

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
    layer = layer_class(make_base().to("cpu"), "a", config, r=4)
    layer.update_layer("b", 4, 1, config=config)
    names = ["a"]
    layer.set_adapter(names)
    names.append("b")  # a line of the caller's own, after the call
    observed[layer_class.__name__] = (layer.active_adapters, layer.lora_E["b"].requires_grad)
expected = (["a"], False)
present = all(value == (["a", "b"], False) for value in observed.values())

print(f"observed: {observed}")
print(f"expected: {expected}")
print("REPRODUCED" if present else "NOT REPRODUCED")
sys.exit(0 if present else 1)

"""PEFT: update_layer with inference_mode=True freezes the adapter that is in training."""

import sys

import bitsandbytes as bnb
from peft import AdaLoraConfig
from peft.tuners.adalora.bnb import SVDLinear4bit, SVDLinear8bitLt

LAYERS = {
    SVDLinear8bitLt: lambda: bnb.nn.Linear8bitLt(64, 64, bias=False, has_fp16_weights=False),
    SVDLinear4bit: lambda: bnb.nn.Linear4bit(64, 64, bias=False),
}
config = AdaLoraConfig(total_step=10)

frozen = AdaLoraConfig(total_step=10, inference_mode=True)
observed = {}
for layer_class, make_base in LAYERS.items():
    layer = layer_class(make_base().to("cpu"), "trained", config, r=4)
    layer.update_layer("frozen", 4, 1, config=frozen)
    active = layer.active_adapters
    observed[layer_class.__name__] = (active, layer.lora_E["trained"].requires_grad)
expected = (["trained"], True)
present = all(value == (["trained"], False) for value in observed.values())

print(f"observed: {observed}")
print(f"expected: {expected}")
print("REPRODUCED" if present else "NOT REPRODUCED")
sys.exit(0 if present else 1)

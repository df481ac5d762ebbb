"""PEFT: update_layer that raises leaves r, alpha and dropout changed, tensors not."""

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
    for name, rank in (("second", 2.5), ("", 4), ("dotted.name", 4)):
        layer = layer_class(make_base().to("cpu"), "default", config, r=4)
        try:
            layer.update_layer(name, rank, 16, config=config)
        except (TypeError, KeyError) as error:
            # Torch refuses: randn(2.5, 64), ModuleDict[""], ModuleDict["dotted.name"].
            left = [
                key for key in ("r", "lora_alpha", "lora_dropout") if name in getattr(layer, key)
            ]
            observed[layer_class.__name__, name] = (type(error).__name__, left)
expected = "ValueError or TypeError from the layer, and nothing left behind"
present = [left for _, left in observed.values()] == [
    ["r", "lora_alpha", "lora_dropout"],
    ["r", "lora_alpha"],
    ["r", "lora_alpha"],
] * 2

print(f"observed: {observed}")
print(f"expected: {expected}")
print("REPRODUCED" if present else "NOT REPRODUCED")
sys.exit(0 if present else 1)

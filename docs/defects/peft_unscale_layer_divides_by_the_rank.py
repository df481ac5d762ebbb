"""PEFT: unscale_layer() and set_scale() put alpha / r where AdaLoRA scales by alpha."""

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
    layer = layer_class(make_base().to("cpu"), "default", config, r=8, lora_alpha=16)
    start = layer.scaling["default"]
    layer.scale_layer(2.0)
    layer.unscale_layer()  # documented as "reset to initial scale"
    pruned = layer_class(make_base().to("cpu"), "default", config, r=0, lora_alpha=16)
    try:
        pruned.unscale_layer()
        at_rank_zero = pruned.scaling["default"]
    except ZeroDivisionError as error:
        at_rank_zero = repr(error)
    layer_again = layer_class(make_base().to("cpu"), "default", config, r=8, lora_alpha=16)
    layer_again.set_scale("default", 1.0)
    observed[layer_class.__name__] = (
        start,
        layer.scaling["default"],
        layer_again.scaling["default"],
        at_rank_zero,
    )
expected = (16, 16, 16, 16)
present = all(v[:3] == (16, 2.0, 2.0) and "Zero" in str(v[3]) for v in observed.values())

print(f"observed: {observed}")
print(f"expected: {expected}")
print("REPRODUCED" if present else "NOT REPRODUCED")
sys.exit(0 if present else 1)

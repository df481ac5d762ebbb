"""PEFT: neither layer loads the state_dict that it has just returned."""

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
    if layer_class is SVDLinear4bit:
        layer.base_layer.support_avx512bf16_for_cpu = False  # fails without any repacking
    layer(torch.randn(2, 64))  # the 8-bit layer only fails after a forward
    try:
        observed[layer_class.__name__] = str(layer.load_state_dict(layer.state_dict()))
    except RuntimeError as error:
        observed[layer_class.__name__] = f"RuntimeError: {' '.join(str(error).split())[:120]}"
expected = "<All keys matched successfully>"
present = all(result.startswith("RuntimeError") for result in observed.values())

print(f"observed: {observed}")
print(f"expected: {expected}")
print("REPRODUCED" if present else "NOT REPRODUCED")
sys.exit(0 if present else 1)

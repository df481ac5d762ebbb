"""PEFT: an adapter that is added to a layer in eval mode drops elements in eval mode."""

import sys

import bitsandbytes as bnb
import torch
from peft import AdaLoraConfig
from peft.tuners.adalora.bnb import SVDLinear4bit, SVDLinear8bitLt

LAYERS = {
    SVDLinear8bitLt: lambda: bnb.nn.Linear8bitLt(64, 64, bias=False, has_fp16_weights=False),
    SVDLinear4bit: lambda: bnb.nn.Linear4bit(64, 64, bias=False),
}
config = AdaLoraConfig(total_step=10, lora_dropout=0.5)

observed = {}
for layer_class, make_base in LAYERS.items():
    torch.manual_seed(0)
    layer = layer_class(make_base().to("cpu"), "default", config, r=4).eval()
    layer.update_layer("second", 4, 4, config=config)
    layer.set_adapter("second")
    with torch.no_grad():
        layer.lora_E["second"].fill_(100.0)
    x = torch.randn(2, 64)
    calls_agree = torch.equal(layer(x), layer(x))
    modes = (layer.training, layer.lora_dropout["second"].training)
    observed[layer_class.__name__] = (*modes, calls_agree)
expected = (False, False, True)
present = all(value == (False, True, False) for value in observed.values())

print("layer.training, its new dropout's training, two calls agree:")
print(f"observed: {observed}")
print(f"expected: {expected}")
print("REPRODUCED" if present else "NOT REPRODUCED")
sys.exit(0 if present else 1)

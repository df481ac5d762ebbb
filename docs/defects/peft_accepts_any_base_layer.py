"""PEFT: both layers accept an unquantised base, the other's base, and each other."""

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
for layer_class in LAYERS:
    (other,) = set(LAYERS) - {layer_class}
    wrong = {
        "Linear": torch.nn.Linear(64, 64),
        "the other quantised linear": LAYERS[other]().to("cpu"),
        "an SVD layer": layer_class(LAYERS[layer_class]().to("cpu"), "inner", config, r=4),
    }
    for kind, base in wrong.items():
        try:
            y = layer_class(base, "default", config, r=4)(torch.randn(2, 64))
            observed[layer_class.__name__, kind] = f"accepted, returns {tuple(y.shape)}"
        except (TypeError, ValueError) as error:
            observed[layer_class.__name__, kind] = repr(error)
expected = "TypeError or ValueError in the constructor, naming the base layers that are supported"
present = all("accepted" in result for result in observed.values())

print(f"observed: {observed}")
print(f"expected: {expected}")
print("REPRODUCED" if present else "NOT REPRODUCED")
sys.exit(0 if present else 1)

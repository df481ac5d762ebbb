"""PEFT: set_adapter(['a', 'a']) adds the adapter twice."""

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
    base = make_base().to("cpu")
    layer = layer_class(base, "a", config, r=4, lora_alpha=16)
    torch.nn.init.normal_(layer.lora_E["a"], std=100)
    x = torch.ones(1, 64)
    once = layer(x) - base(x)
    layer.set_adapter(["a", "a"])
    observed[layer_class.__name__] = round(((layer(x) - base(x)) / once).mean().item(), 3)
expected = "ValueError, or 1.0: the sum in the contract is over the set of active adapters"
present = set(observed.values()) == {2.0}

print(f"observed: {observed}")
print(f"expected: {expected}")
print("REPRODUCED" if present else "NOT REPRODUCED")
sys.exit(0 if present else 1)

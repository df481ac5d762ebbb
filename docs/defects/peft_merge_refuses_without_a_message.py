"""PEFT: merge, safe_merge and unmerge raise NotImplementedError with an empty message."""

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
    layer = layer_class(make_base().to("cpu"), "default", config, r=4)
    calls = {
        "merge()": layer.merge,
        "merge(safe_merge=True)": lambda layer=layer: layer.merge(safe_merge=True),
        "unmerge()": layer.unmerge,
    }
    for call, method in calls.items():
        try:
            observed[layer_class.__name__, call] = method()
        except NotImplementedError as error:
            observed[layer_class.__name__, call] = f"NotImplementedError({str(error)!r})"
expected = "NotImplementedError that says why, and what to do instead"
present = set(observed.values()) == {"NotImplementedError('')"}

print(f"observed: {observed}")
print(f"expected: {expected}")
print("REPRODUCED" if present else "NOT REPRODUCED")
sys.exit(0 if present else 1)

"""bitsandbytes: moving a quantised layer to the meta device raises."""

import sys

import bitsandbytes as bnb

layers = {
    "Linear8bitLt": bnb.nn.Linear8bitLt(64, 64, bias=False, has_fp16_weights=False),
    "Linear4bit": bnb.nn.Linear4bit(64, 64, bias=False),
}
observed = {}
for name, layer in layers.items():
    try:
        observed[name] = layer.to("cpu").to("meta").weight.device.type
    except RuntimeError as error:
        observed[name] = f"RuntimeError: {str(error)[:90]}"
expected = "meta, as torch.nn.Linear"
present = all(result.startswith("RuntimeError") for result in observed.values())

print(f"observed: {observed}")
print(f"expected: {expected}")
print("REPRODUCED" if present else "NOT REPRODUCED")
sys.exit(0 if present else 1)

"""bitsandbytes: a quantised Linear4bit cannot load its own state_dict."""

import sys

import bitsandbytes as bnb

layer = bnb.nn.Linear4bit(64, 64, bias=False).to("cpu")
try:
    observed = str(layer.load_state_dict(layer.state_dict()))
except RuntimeError as error:
    observed = " ".join(str(error).split())
expected = "<All keys matched successfully>"
present = "Unexpected key(s)" in observed

print(f"observed: {observed}")
print(f"expected: {expected}")
print("REPRODUCED" if present else "NOT REPRODUCED")
sys.exit(0 if present else 1)

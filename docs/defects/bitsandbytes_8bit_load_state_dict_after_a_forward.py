"""bitsandbytes: Linear8bitLt cannot load its own state_dict once it has run."""

import sys

import bitsandbytes as bnb
import torch

layer = bnb.nn.Linear8bitLt(64, 64, bias=False, has_fp16_weights=False).to("cpu")
before = str(layer.load_state_dict(layer.state_dict()))
layer(torch.randn(2, 64))  # moves SCB from the weight to the state, where loading does not look
try:
    after = str(layer.load_state_dict(layer.state_dict()))
except RuntimeError as error:
    after = str(error)
observed = {"before the first forward": before, "after it": after}
expected = "<All keys matched successfully> both times"
present = "matched" in before and "non-quantized" in after

print(f"observed: {observed}")
print(f"expected: {expected}")
print("REPRODUCED" if present else "NOT REPRODUCED")
sys.exit(0 if present else 1)

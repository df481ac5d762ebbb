"""bitsandbytes: the dtype of a Linear4bit's first input becomes its compute_dtype for good."""

import copy
import sys

import bitsandbytes as bnb
import torch

torch.manual_seed(0)
layer = bnb.nn.Linear4bit(64, 64, bias=False).to("cpu")  # compute_dtype is None
x = torch.randn(8, 64, requires_grad=True)  # a gradient keeps the packed kernel out of this
fresh = copy.deepcopy(layer)(x)
layer(x.bfloat16())
difference = ((layer(x) - fresh).norm() / fresh.norm()).item()
observed = (layer.compute_dtype, difference)
expected = (None, 0.0)
present = layer.compute_dtype == torch.bfloat16 and difference > 1e-4

print(f"observed: {observed}")
print(f"expected: {expected}")
print("REPRODUCED" if present else "NOT REPRODUCED")
sys.exit(0 if present else 1)

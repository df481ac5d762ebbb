"""bitsandbytes: the backward of a Linear4bit whose weight fits in one byte raises.

A packed weight of shape (1, 1) is taken for a transposed one, and comes back dequantised as (in, out).
Exit code: 0 when reproduced, 1 when not.
"""

import sys
import warnings

import torch
from bitsandbytes.nn import Linear4bit

warnings.simplefilter("ignore")

layer = Linear4bit(2, 1, bias=False, quant_type="nf4", compute_dtype=torch.float32).to("cpu")
x = torch.ones(1, 2, requires_grad=True)
y = layer(x)
try:
    y.sum().backward()
    observed = f"dx of shape {tuple(x.grad.shape)}"
except RuntimeError as error:
    observed = f"RuntimeError: {error}"
print(f"observed: {observed}")
print("expected: dx of shape (1, 2)")
reproduced = observed.startswith("RuntimeError: mat1 and mat2")
print("REPRODUCED" if reproduced else "NOT REPRODUCED")
sys.exit(0 if reproduced else 1)

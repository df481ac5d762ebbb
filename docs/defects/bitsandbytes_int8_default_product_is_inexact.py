"""bitsandbytes: the default backend's int8 product is inexact above in_features = 1040."""

import sys

import torch
from bitsandbytes.backends.default import ops as default_ops

observed = {}
for width in (1040, 1042):
    left = torch.full((1, width), 127, dtype=torch.int8)
    right = left.clone()
    right[0, 0] = 126  # makes the sum odd, and 127 * 127 * 1042 is above 2^24
    # The default backend's body, for CPUs without AVX-512 and devices without a kernel.
    got = default_ops._int8_linear_matmul_impl(left, right).item()
    observed[width] = got - (left.long() @ right.long().T).item()
expected = {1040: 0, 1042: 0}
present = observed[1040] == 0 and observed[1042] != 0

print(f"observed: {observed}")
print(f"expected: {expected}")
print("REPRODUCED" if present else "NOT REPRODUCED")
sys.exit(0 if present else 1)

"""bitsandbytes: an eval forward of Linear4bit computes in bfloat16, whatever was asked for."""

import sys

import bitsandbytes as bnb
import torch

if not bnb.functional.has_avx512bf16():
    print("NOT APPLICABLE here: the CPU has no AVX512-BF16, so the layer is not repacked")
    sys.exit(2)

torch.manual_seed(0)
layer = bnb.nn.Linear4bit(128, 64, bias=False, compute_dtype=torch.float32).to("cpu")
x = torch.randn(8, 128)
with torch.no_grad():
    train, evaluated = layer.train()(x), layer.eval()(x)
observed = ((evaluated - train).norm() / train.norm()).item()
expected = "below 1e-6: compute_dtype is float32"
present = observed > 1e-3  # bfloat16 rounds by 2^-9 = 2e-3 at most

print(f"observed: {observed}")
print(f"expected: {expected}")
print("REPRODUCED" if present else "NOT REPRODUCED")
sys.exit(0 if present else 1)

"""bitsandbytes: a packed eval forward of a transposed 2-D input is silently wrong."""

import sys

import bitsandbytes as bnb
import torch

if not bnb.functional.has_avx512bf16():
    print("NOT APPLICABLE here: the CPU has no AVX512-BF16, so the layer is not repacked")
    sys.exit(2)

torch.manual_seed(0)
layer = bnb.nn.Linear4bit(128, 64, bias=False, quant_type="nf4").to("cpu")

x = torch.randn(128, 8).t()
with torch.no_grad():
    right = layer.eval()(x.contiguous())
    wrong = layer(x)
difference = ((wrong - right).norm() / right.norm()).item()
observed = f"layer(x) differs from layer(x.contiguous()) by {difference:.2f} of its norm"
expected = "0.00"
present = difference > 0.5

print(f"observed: {observed}")
print(f"expected: {expected}")
print("REPRODUCED" if present else "NOT REPRODUCED")
sys.exit(0 if present else 1)

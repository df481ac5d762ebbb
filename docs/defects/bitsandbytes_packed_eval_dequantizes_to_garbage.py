"""bitsandbytes: dequantize_4bit of a layer's weight is garbage after an eval forward."""

import sys

import bitsandbytes as bnb
import torch

if not bnb.functional.has_avx512bf16():
    print("NOT APPLICABLE here: the CPU has no AVX512-BF16, so the layer is not repacked")
    sys.exit(2)

torch.manual_seed(0)
layer = bnb.nn.Linear4bit(128, 64, bias=False, quant_type="nf4").to("cpu")

before = bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
layer.eval()(torch.randn(2, 128))
after = bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
change = (after.float().reshape(before.shape) - before).norm() / before.norm()
observed = f"relative change {change:.2f}"
expected = "relative change 0: the weights are frozen"
present = change > 1

print(f"observed: {observed}")
print(f"expected: {expected}")
print("REPRODUCED" if present else "NOT REPRODUCED")
sys.exit(0 if present else 1)

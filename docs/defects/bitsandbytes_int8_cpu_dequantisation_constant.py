"""bitsandbytes: the CPU's int8 output is 1.8e-5 too large: 6.200124e-05 for 1 / 127^2."""

import sys

import bitsandbytes as bnb
import torch

torch.manual_seed(0)
layer = bnb.nn.Linear8bitLt(64, 64, bias=False, has_fp16_weights=False).to("cpu").eval()
x = torch.randn(8, 64)
codes, scales, _ = bnb.functional.int8_vectorwise_quant(x.half())
exact = (codes.double() @ layer.weight.CB.double().T) * scales[:, None].double()
exact = exact * layer.weight.SCB.double() / 127**2
ratio = layer(x).double() / exact
observed = f"output / exact - 1 = {ratio.mean() - 1:.3e}, spread {ratio.std():.1e}"
expected = f"0 within the spread; 6.200124e-05 * 127^2 - 1 = {6.200124e-05 * 127**2 - 1:.3e}"
present = bool((ratio - 6.200124e-05 * 127**2).abs().max() < 4 * 2**-24)  # four fp32 roundings

print(f"observed: {observed}")
print(f"expected: {expected}")
print("REPRODUCED" if present else "NOT REPRODUCED")
sys.exit(0 if present else 1)

"""bitsandbytes: int8 eval with in_features = 1 returns uninitialised memory (torch._int_mm)."""

import sys

import bitsandbytes as bnb
import torch

if torch.backends.cpu.get_cpu_capability() != "AVX512":
    print("NOT APPLICABLE here: bitsandbytes takes torch._int_mm on AVX-512 only")
    sys.exit(2)
left = torch.full((16, 1), 3, dtype=torch.int8)
right = torch.arange(1, 65, dtype=torch.int8).view(64, 1)
product = torch.ops.bitsandbytes.int8_linear_matmul(left, right)
exact = left.int() * right.view(1, -1)
torch.manual_seed(0)
weight = torch.nn.Linear(1, 64, bias=False).weight.detach()
layer = bnb.nn.Linear8bitLt(1, 64, bias=False, has_fp16_weights=False)
layer.load_state_dict({"weight": weight})
error = (layer.to("cpu").eval()(torch.ones(16, 1)) - weight.T).abs().max().item()
observed = (
    f"{int((product != exact).sum())} of {exact.numel()} products wrong, y off by {error:.3g}"
)
expected = "0 products wrong, y off by less than 1e-3"
present = not torch.equal(product, exact)

print(f"observed: {observed}")
print(f"expected: {expected}")
print("REPRODUCED" if present else "NOT REPRODUCED")
sys.exit(0 if present else 1)

"""PEFT: the state_dict of SVDLinear4bit changes when the layer has run in eval mode."""

import sys

import bitsandbytes as bnb
import torch
from peft import AdaLoraConfig
from peft.tuners.adalora.bnb import SVDLinear4bit

if not bnb.functional.has_avx512bf16():
    print("NOT APPLICABLE here: the CPU has no AVX512-BF16, so the layer is not repacked")
    sys.exit(2)
config = AdaLoraConfig(total_step=10)

torch.manual_seed(0)
base = bnb.nn.Linear4bit(256, 64, bias=False, compress_statistics=False).to("cpu")
layer = SVDLinear4bit(base, "default", config, r=4)
before = layer.state_dict()["base_layer.weight.absmax"].clone()
with torch.no_grad():
    layer.eval()(torch.randn(2, 256))
after = layer.state_dict()["base_layer.weight.absmax"]
observed = {
    "shape": tuple(after.shape),
    "relative change in order of storage": (
        (after.float().reshape(-1) - before).norm() / before.norm()
    ).item(),
}
expected = {"shape": tuple(before.shape), "relative change in order of storage": 0.0}
present = observed["shape"] != expected["shape"]

print(f"observed: {observed}")
print(f"expected: {expected}")
print("REPRODUCED" if present else "NOT REPRODUCED")
sys.exit(0 if present else 1)

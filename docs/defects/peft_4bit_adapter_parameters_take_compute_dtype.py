"""PEFT: adapter parameters and ranknum take the base's compute_dtype, not float32."""

import sys

import bitsandbytes as bnb
import torch
from peft import AdaLoraConfig
from peft.tuners.adalora.bnb import SVDLinear4bit

config = AdaLoraConfig(total_step=10)

base = bnb.nn.Linear4bit(64, 64, bias=False, compute_dtype=torch.bfloat16).to("cpu")
layer = SVDLinear4bit(base, "default", config, r=257)
observed = {
    "dtypes": {getattr(layer, n)["default"].dtype for n in ("lora_A", "lora_E", "lora_B")},
    "ranknum": layer.ranknum["default"].item(),  # bfloat16 has no 257
    "ranknum + 1e-5": (layer.ranknum["default"] + 1e-5).item(),
}
expected = {"dtypes": {torch.float32}, "ranknum": 257.0, "ranknum + 1e-5": 257.00001}
present = observed["dtypes"] == {torch.bfloat16} and observed["ranknum"] == 256

print(f"observed: {observed}")
print(f"expected: {expected}")
print("REPRODUCED" if present else "NOT REPRODUCED")
sys.exit(0 if present else 1)

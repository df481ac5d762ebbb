"""PEFT: an adapter added after a bfloat16 forward is bfloat16, with a trainable ranknum."""

import sys

import bitsandbytes as bnb
import torch
from peft import AdaLoraConfig
from peft.tuners.adalora.bnb import SVDLinear4bit

config = AdaLoraConfig(total_step=10)
base = bnb.nn.Linear4bit(64, 64, bias=False, quant_type="nf4").to("cpu")

layer = SVDLinear4bit(base, "first", config, r=4)
layer(torch.randn(2, 64, dtype=torch.bfloat16))  # bitsandbytes latches compute_dtype here
layer.update_layer("second", 4, 16, config=config)
observed = {n: (layer.lora_A[n].dtype, layer.ranknum[n].requires_grad) for n in layer.lora_A}
expected = dict.fromkeys(layer.lora_A, (torch.float32, False))
present = observed["first"] == expected["first"] and observed["second"] == (torch.bfloat16, True)

print(f"observed: {observed}")
print(f"expected: {expected}")
print("REPRODUCED" if present else "NOT REPRODUCED")
sys.exit(0 if present else 1)

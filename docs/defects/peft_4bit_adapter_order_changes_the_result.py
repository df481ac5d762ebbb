"""PEFT: x, rounded to one adapter's dtype, is handed on to the next, so order matters."""

import sys

import bitsandbytes as bnb
import torch
from peft import AdaLoraConfig
from peft.tuners.adalora.bnb import SVDLinear4bit

config = AdaLoraConfig(total_step=10)

torch.manual_seed(0)
base = bnb.nn.Linear4bit(64, 64, bias=False, quant_type="nf4").to("cpu")

layer = SVDLinear4bit(base, "wide", config, r=4)
layer(torch.randn(2, 64, dtype=torch.bfloat16))
layer.update_layer("narrow", 4, 16, config=config)  # bfloat16: see the script on a later adapter
for parameters in (layer.lora_A, layer.lora_E, layer.lora_B):
    torch.nn.init.normal_(parameters["wide"])
    torch.nn.init.normal_(parameters["narrow"])

x = torch.randn(8, 64)
with torch.no_grad():
    layer.set_adapter(["wide"])
    exact = layer(x) - base(x)
    layer.set_adapter(["narrow"])
    total = layer(x) + exact
    observed = {}
    for order in (["wide", "narrow"], ["narrow", "wide"]):
        layer.set_adapter(order)
        observed[" then ".join(order)] = ((layer(x) - total).norm() / total.norm()).item()
expected = "both orders within a few fp32 roundings, below 1e-6"
present = observed["wide then narrow"] < 1e-6 < 1e-4 < observed["narrow then wide"]

print(f"observed: {observed}")
print(f"expected: {expected}")
print("REPRODUCED" if present else "NOT REPRODUCED")
sys.exit(0 if present else 1)

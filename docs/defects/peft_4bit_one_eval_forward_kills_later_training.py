"""PEFT: one no-grad eval forward of SVDLinear4bit, and layers before it stop learning."""

import sys

import bitsandbytes as bnb
import torch
from peft import AdaLoraConfig
from peft.tuners.adalora.bnb import SVDLinear4bit

if not bnb.functional.has_avx512bf16():
    print("NOT APPLICABLE here: the CPU has no AVX512-BF16, so the layer is not repacked")
    sys.exit(2)
config = AdaLoraConfig(total_step=10)


def grads(evaluated: bool) -> list[float]:
    """Norms of dE of two stacked layers, of which the second is a fresh adapter (E = 0)."""
    torch.manual_seed(0)
    bases = [bnb.nn.Linear4bit(128, 128, bias=False).to("cpu") for _ in range(2)]
    model = torch.nn.Sequential(*(SVDLinear4bit(b, "default", config, r=4) for b in bases))
    x = torch.randn(4, 128)
    if evaluated:
        with torch.no_grad():
            model.eval()(x)
    model.train()(x).pow(2).sum().backward()
    return [getattr(layer.lora_E["default"].grad, "norm", lambda: None)() for layer in model]


observed, expected = grads(evaluated=True), grads(evaluated=False)
present = not observed[0] and bool(expected[0])

print(f"observed: {observed}")
print(f"expected: {expected}")
print("REPRODUCED" if present else "NOT REPRODUCED")
sys.exit(0 if present else 1)

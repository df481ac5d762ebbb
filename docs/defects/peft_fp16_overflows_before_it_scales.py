"""PEFT: both layers return inf in float16 where the true result is 16384, or 1289."""

import sys

import bitsandbytes as bnb
import torch
from peft import AdaLoraConfig
from peft.tuners.adalora.bnb import SVDLinear4bit, SVDLinear8bitLt

LAYERS = {
    SVDLinear8bitLt: lambda: bnb.nn.Linear8bitLt(64, 64, bias=False, has_fp16_weights=False),
    SVDLinear4bit: lambda: bnb.nn.Linear4bit(64, 64, bias=False),
}
config = AdaLoraConfig(total_step=10)


def forward(layer_class: type, alpha: int, product: float) -> float:
    """Layer output for x = 1 when x A'B.T is `product` and ranknum is 64."""
    layer = layer_class(LAYERS[layer_class]().to("cpu"), "default", config, r=1, lora_alpha=alpha)
    with torch.no_grad():
        layer.lora_A["default"].fill_(1 / 64)
        layer.lora_E["default"].fill_(1)
        layer.lora_B["default"].fill_(product)
        layer.ranknum["default"].fill_(64)
        return layer(torch.ones(1, 64, dtype=torch.float16))[0, 0].item()


# alpha 16: the product fits into fp16, 65504 at most, only after the division by ranknum.
# alpha 32: the product fits, times alpha it does not.
cases = [(16, 65536.0), (32, 32768.0), (1, 82496.0)]
observed = {cls.__name__: [forward(cls, *case) for case in cases] for cls in LAYERS}
expected = [alpha * product / (64 + 1e-5) for alpha, product in cases]  # plus |base| < 5
present = all(value == float("inf") for values in observed.values() for value in values)

print(f"observed: {observed}")
print(f"expected: {expected}")
print("REPRODUCED" if present else "NOT REPRODUCED")
sys.exit(0 if present else 1)

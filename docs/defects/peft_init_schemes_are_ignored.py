"""PEFT: init_lora_weights 'pissa', 'olora', 'eva', 'gaussian' or any word acts like True."""

import sys
import warnings

import bitsandbytes as bnb
import torch
from peft import AdaLoraConfig
from peft.tuners.adalora.bnb import SVDLinear4bit, SVDLinear8bitLt

LAYERS = {
    SVDLinear8bitLt: lambda: bnb.nn.Linear8bitLt(64, 64, bias=False, has_fp16_weights=False),
    SVDLinear4bit: lambda: bnb.nn.Linear4bit(64, 64, bias=False),
}

warnings.simplefilter("ignore")  # the config warns that 'eva' came without its own config
schemes = (True, "gaussian", "pissa", "olora", "eva", "no-such-scheme")


def initial(layer_class: type, scheme: bool | str) -> torch.Tensor:
    """A, B and E of a fresh layer in one row."""
    torch.manual_seed(0)
    base = LAYERS[layer_class]().to("cpu")
    config = AdaLoraConfig(total_step=10, init_lora_weights=scheme)
    layer = layer_class(base, "default", config, r=4)
    parameters = (layer.lora_A, layer.lora_B, layer.lora_E)
    return torch.cat([p["default"].detach().flatten() for p in parameters])


observed = {
    cls.__name__: [torch.equal(initial(cls, s), initial(cls, True)) for s in schemes]
    for cls in LAYERS
}
expected = "ValueError for each scheme that AdaLoRA does not have"
present = all(all(same) for same in observed.values())

print(f"observed: {observed}")
print(f"expected: {expected}")
print("REPRODUCED" if present else "NOT REPRODUCED")
sys.exit(0 if present else 1)

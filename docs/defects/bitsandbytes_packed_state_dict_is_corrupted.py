"""bitsandbytes: state_dict() after an eval forward transposes and rounds absmax."""

import sys

import bitsandbytes as bnb
import torch

if not bnb.functional.has_avx512bf16():
    print("NOT APPLICABLE here: the CPU has no AVX512-BF16, so the layer is not repacked")
    sys.exit(2)

torch.manual_seed(0)


def read(layer: bnb.nn.Linear4bit) -> torch.Tensor:
    """W (out, in) of a layer that is not packed."""
    return bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state).float()


observed = {}
for nested in (False, True):
    for width in (64, 256):
        layer = bnb.nn.Linear4bit(width, 64, bias=False, compress_statistics=nested)
        # Rows of different scale, so that a permuted absmax shows.
        layer.load_state_dict({"weight": torch.randn(64, width) * torch.randn(64, 1).exp()})
        before = read(layer.to("cpu"))
        layer.eval()(torch.randn(2, width))
        layer.state_dict()  # unpacks the layer in place
        change = (read(layer) - before).norm() / before.norm()
        observed["nested" if nested else "plain", width] = round(change.item(), 4)
expected = "no change: the weights are frozen"
# Plain and wider than one block: permuted. The others only lose the low half of absmax.
present = observed["plain", 256] > 0.1 and min(observed.values()) > 0

print(f"observed: {observed}")
print(f"expected: {expected}")
print("REPRODUCED" if present else "NOT REPRODUCED")
sys.exit(0 if present else 1)

"""bitsandbytes: 4-bit dequantise is wrong on AVX-512 when in % 16 == 0 and in % 64 != 0."""

import sys

import bitsandbytes as bnb
import torch

if torch.backends.cpu.get_cpu_capability() != "AVX512":
    print("NOT APPLICABLE here: the CPU has no AVX-512")
    sys.exit(2)


def layer_error(width: int) -> float:
    """Relative error of a 4-bit layer against its own unquantised weight."""
    torch.manual_seed(0)
    # Rows of different scale: blocks of 64 that straddle two rows then differ from their neighbour.
    weight = torch.randn(64, width) * torch.randn(64, 1).exp()
    layer = bnb.nn.Linear4bit(width, 64, bias=False, quant_type="nf4")
    layer.load_state_dict({"weight": weight})
    x = torch.randn(32, width)
    true = x @ weight.T
    return round(((layer.to("cpu")(x) - true).norm() / true.norm()).item(), 3)


wrong, right = (16, 48, 80, 96, 160), (40, 64, 72, 100, 128, 192)
observed = {width: layer_error(width) for width in sorted(wrong + right)}
expected = "about 0.09, NF4's own error, at every width"
present = all(observed[w] > 0.2 for w in wrong) and all(observed[w] < 0.15 for w in right)

print(f"observed: {observed}")
print(f"expected: {expected}")
print("REPRODUCED" if present else "NOT REPRODUCED")
sys.exit(0 if present else 1)

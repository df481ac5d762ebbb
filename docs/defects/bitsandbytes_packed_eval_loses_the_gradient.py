"""bitsandbytes: after one eval forward, a Linear4bit in training gives x no gradient."""

import sys
import warnings

import bitsandbytes as bnb
import torch

if not bnb.functional.has_avx512bf16():
    print("NOT APPLICABLE here: the CPU has no AVX512-BF16, so the layer is not repacked")
    sys.exit(2)


def dx(evaluated: bool) -> torch.Tensor | None:
    """Gradient of x in training, after an eval forward or without one."""
    torch.manual_seed(0)
    layer = bnb.nn.Linear4bit(128, 64, bias=False).to("cpu")
    x = torch.randn(2, 128)
    if evaluated:
        layer.eval()(x)
    x.requires_grad_()
    layer.train()(x).sum().backward()  # no error, one warning
    return x.grad


warnings.simplefilter("ignore")
observed, gradient = dx(evaluated=True), dx(evaluated=False)
expected = f"a gradient of norm {gradient.norm():.2f}"
present = observed is None and gradient is not None

print(f"observed: {observed}")
print(f"expected: {expected}")
print("REPRODUCED" if present else "NOT REPRODUCED")
sys.exit(0 if present else 1)

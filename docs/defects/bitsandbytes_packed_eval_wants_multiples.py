"""bitsandbytes: an eval forward of Linear4bit fails unless out % 32 == 0 and in % 64 == 0."""

import sys

import bitsandbytes as bnb
import torch

if not bnb.functional.has_avx512bf16():
    print("NOT APPLICABLE here: the CPU has no AVX512-BF16, so the layer is not repacked")
    sys.exit(2)

observed = {}
for width, out in ((128, 48), (63, 64), (96, 64), (128, 64)):
    layer = bnb.nn.Linear4bit(width, out, bias=False, compress_statistics=True).to("cpu")
    try:
        result = tuple(layer.eval()(torch.randn(2, width)).shape)
    except (AssertionError, RuntimeError) as error:
        result = f"{type(error).__name__}: {error}"
    observed[width, out] = (
        result,
        "still nested" if layer.weight.quant_state.nested else "not nested",
    )
expected = "(2, out) everywhere; a failure that changes nothing (still nested)"
failed = [case for case, (result, _) in observed.items() if isinstance(result, str)]
# in % 64 fails last, when the double quantisation of absmax has already been undone in place.
present = failed == [(128, 48), (63, 64), (96, 64)] and observed[96, 64][1] == "not nested"

print(f"observed: {observed}")
print(f"expected: {expected}")
print("REPRODUCED" if present else "NOT REPRODUCED")
sys.exit(0 if present else 1)

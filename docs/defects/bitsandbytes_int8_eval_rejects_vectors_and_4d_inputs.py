"""bitsandbytes: Linear8bitLt in eval raises for 1-D and 4-D inputs that it takes in train."""

import sys

import bitsandbytes as bnb
import torch

layer = bnb.nn.Linear8bitLt(64, 64, bias=False, has_fp16_weights=False).to("cpu")

observed = {}
for shape in ((64,), (2, 64), (2, 3, 64), (2, 3, 4, 64)):
    for training in (True, False):
        try:
            result = tuple(layer.train(training)(torch.randn(shape)).shape)
        except (IndexError, RuntimeError) as error:
            result = type(error).__name__
        observed[len(shape), "train" if training else "eval"] = result
expected = "the input's shape in all eight cases"
failed = {case for case, result in observed.items() if isinstance(result, str)}
present = failed == {(1, "eval"), (4, "eval")}

print(f"observed: {observed}")
print(f"expected: {expected}")
print("REPRODUCED" if present else "NOT REPRODUCED")
sys.exit(0 if present else 1)

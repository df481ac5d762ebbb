"""bitsandbytes: Linear8bitLt is another function in train mode than in eval, on the CPU."""

import sys

import bitsandbytes as bnb
import torch

torch.manual_seed(0)
layer = bnb.nn.Linear8bitLt(64, 64, bias=False, has_fp16_weights=False).to("cpu")
x = torch.randn(64, 64)
with torch.no_grad():
    dequantised = x @ (layer.weight.CB * layer.weight.SCB[:, None] / 127).T
    results = {"train": layer.train()(x), "eval": layer.eval()(x)}
observed = {
    mode: ((y - dequantised).norm() / dequantised.norm()).item() for mode, y in results.items()
}
expected = "LLM.int8() in both, as on CUDA: about 6e-3 from the unquantised activations"
present = observed["train"] < 1e-6 and observed["eval"] > 1e-3

print(f"observed: {observed}")
print(f"expected: {expected}")
print("REPRODUCED" if present else "NOT REPRODUCED")
sys.exit(0 if present else 1)

"""bitsandbytes: Linear8bitLt logs a warning at every eval forward that is not float16."""

import logging
import sys

import bitsandbytes as bnb
import torch

layer = bnb.nn.Linear8bitLt(64, 64, bias=False, has_fp16_weights=False).to("cpu")

counts = {"train": 0, "eval": 0}


class Counter(logging.Filter):
    """Counts the records of the mode the layer is in, and drops them."""

    def filter(self, record: logging.LogRecord) -> bool:
        counts["train" if layer.training else "eval"] += "will be cast" in record.msg
        return False


logger = logging.getLogger("bitsandbytes.autograd._functions")
counter = Counter()
logger.addFilter(counter)
for training in (True, False):
    for _ in range(3):
        layer.train(training)(torch.randn(2, 64))
logger.removeFilter(counter)
observed = counts
expected = "at most one in all"
present = counts == {"train": 0, "eval": 3}

print(f"observed: {observed}")
print(f"expected: {expected}")
print("REPRODUCED" if present else "NOT REPRODUCED")
sys.exit(0 if present else 1)

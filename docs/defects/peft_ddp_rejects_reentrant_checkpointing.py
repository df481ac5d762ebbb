"""PEFT: under DDP, the orthogonal term and reentrant checkpointing fail together. One process shows it."""

import sys
from types import SimpleNamespace

import torch
import torch.distributed as dist
from peft import AdaLoraConfig, get_peft_model
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint


class Model(torch.nn.Module):
    """Two linears, the first checkpointed."""

    def __init__(self, *, reentrant: bool) -> None:
        super().__init__()
        self.one, self.two = torch.nn.Linear(16, 16), torch.nn.Linear(16, 16)
        self.reentrant = reentrant

    def forward(self, x: torch.Tensor) -> SimpleNamespace:
        h = checkpoint(self.one, x, use_reentrant=self.reentrant)
        return SimpleNamespace(loss=self.two(h).pow(2).mean())


def train(*, reentrant: bool, regularised: bool) -> str:
    """What two steps do; AdaLoraModel adds the term, the model within it does not."""
    config = AdaLoraConfig(total_step=10, target_modules=["one", "two"])
    tuner = get_peft_model(Model(reentrant=reentrant), config).base_model
    model = DistributedDataParallel(tuner if regularised else tuner.model)
    try:
        for _ in range(2):
            model(torch.randn(2, 16, requires_grad=True)).loss.backward()
    except RuntimeError as error:
        return str(error).partition(". ")[0]
    return "no error"


dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
observed = {
    "reentrant": train(reentrant=True, regularised=True),
    "not reentrant": train(reentrant=False, regularised=True),
    "reentrant, without the term": train(reentrant=True, regularised=False),
}
dist.destroy_process_group()
expected = dict.fromkeys(observed, "no error")
present = "only once" in observed["reentrant"]

print(f"observed: {observed}")
print(f"expected: {expected}")
print("REPRODUCED" if present else "NOT REPRODUCED")
sys.exit(0 if present else 1)

"""PEFT: after fully_shard, update_and_allocate raises at the first masking. One process shows it."""

import sys

import torch
import torch.distributed as dist
from peft import AdaLoraConfig, get_peft_model
from torch.distributed.fsdp import fully_shard

dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
schedule = {"init_r": 4, "target_r": 2, "tinit": 0, "tfinal": 1, "total_step": 10}
config = AdaLoraConfig(**schedule, target_modules=["0"])
model = get_peft_model(torch.nn.Sequential(torch.nn.Linear(16, 16)), config)
fully_shard(model, mesh=dist.init_device_mesh("cpu", (1,)))
try:
    for step in range(3):
        model(torch.randn(2, 16)).sum().backward()
        model.base_model.update_and_allocate(step)
    observed = "no error"
except RuntimeError as error:
    observed = f"step {step}: RuntimeError: {error}"
dist.destroy_process_group()
expected = "no error"
present = observed != expected

print(f"observed: {observed}")
print(f"expected: {expected}")
print("REPRODUCED" if present else "NOT REPRODUCED")
sys.exit(0 if present else 1)

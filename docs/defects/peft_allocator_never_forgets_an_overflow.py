"""PEFT: after one step whose gradients overflow, which GradScaler skips, nothing is pruned any more."""

import sys
import warnings

import torch
from peft import AdaLoraConfig, get_peft_model

warnings.simplefilter("ignore")


def ranks_left(scale: float) -> tuple[bool, int]:
    """Whether the first step overflowed, and singular values left when the budget is 2."""
    torch.manual_seed(0)
    schedule = {"init_r": 4, "target_r": 2, "tinit": 0, "tfinal": 1, "total_step": 10}
    config = AdaLoraConfig(**schedule, target_modules=["0"])
    model = get_peft_model(torch.nn.Sequential(torch.nn.Linear(64, 64)), config)
    E = model.base_model.model[0].lora_E["default"]
    torch.nn.init.ones_(E)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    for step in range(9):
        with torch.autocast("cpu", torch.float16):
            loss = model(torch.randn(8, 64)).float().pow(2).mean()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        model.base_model.update_and_allocate(step)
        scaler.update()
        optimizer.zero_grad()
    return scaler.get_scale() < scale, int((E != 0).sum())


observed, expected = ranks_left(2.0**24), ranks_left(2.0**10)
present = observed[0] and observed[1] > 2 and expected == (False, 2)

print("the first step overflows, singular values left:")
print(f"observed: {observed}")
print(f"expected: (True, 2), as without an overflow: {expected}")
print("REPRODUCED" if present else "NOT REPRODUCED")
sys.exit(0 if present else 1)

"""PEFT: the scores of fp16 adapters underflow to 0, and every singular value is masked."""

import sys

import torch
from peft import AdaLoraConfig, get_peft_model


def ranks_left(dtype: torch.dtype) -> tuple[int, int]:
    """Singular values that are not 0 after one allocation with budget 3, and scores that are not."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(64, 64)).to(dtype)
    schedule = {"init_r": 4, "target_r": 2, "tinit": 1, "tfinal": 1, "total_step": 10}
    config = AdaLoraConfig(**schedule, target_modules=["0"])
    model = get_peft_model(model, config, autocast_adapter_dtype=False)
    E = model.base_model.model[0].lora_E["default"]
    torch.nn.init.constant_(E, 0.1)
    for step in (1, 2):
        model.zero_grad()
        model(torch.randn(8, 64, dtype=dtype)).pow(2).mean().backward()
        model.base_model.update_and_allocate(step)
    allocator = model.base_model.rankallocator
    scores = [int((allocator._element_score(name) != 0).sum()) for name in allocator.ipt]
    return int((E != 0).sum()), sum(scores)


observed, expected = ranks_left(torch.float16), ranks_left(torch.float32)
present = observed == (0, 0) and expected[0] == 3

print("singular values left, scores that are not 0:")
print(f"observed: {observed} in float16")
print(f"expected: {expected}, as in float32")
print("REPRODUCED" if present else "NOT REPRODUCED")
sys.exit(0 if present else 1)

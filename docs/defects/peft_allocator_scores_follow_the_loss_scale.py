"""PEFT: a loss scale that GradScaler halves midway changes which singular values are masked."""

import sys

import torch
from peft import AdaLoraConfig, get_peft_model


def kept(scales: list[float], seed: int) -> list[int]:
    """The singular values that one allocation after these steps keeps; nothing else differs."""
    torch.manual_seed(seed)
    last = len(scales) - 1
    schedule = {"tinit": last - 1, "tfinal": 1, "total_step": last + 2}
    config = AdaLoraConfig(**schedule, init_r=8, target_r=3, target_modules=["0", "1"])
    base = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Linear(64, 64))
    model = get_peft_model(base, config)
    E = [layer.lora_E["default"] for layer in model.base_model.model]
    for values in E:
        torch.nn.init.normal_(values)
    for step, scale in enumerate(scales):
        model.zero_grad()
        (scale * model(torch.randn(4, 64)).pow(2).mean()).backward()
        model.base_model.update_and_allocate(step)
    return torch.cat(E).flatten().nonzero().flatten().tolist()


plain = [kept([1.0] * 12, seed) for seed in range(8)]
constant = [kept([65536.0] * 12, seed) for seed in range(8)]
halved = [kept([65536.0] * 6 + [32768.0] * 6, seed) for seed in range(8)]
observed = sum(a != b for a, b in zip(plain, halved, strict=True))
present = observed > 0 and plain == constant

print("models of 8 in which a scale that is halved midway changes the choice:")
print(f"observed: {observed}")
print("expected: 0, as for a constant scale")
print("REPRODUCED" if present else "NOT REPRODUCED")
sys.exit(0 if present else 1)

"""On which device a run asks: what `--device` means, and which GPU each of several processes takes."""

from __future__ import annotations

import re

import torch


def resolve_device(name: str) -> torch.device:
    """The device that `--device` means; `auto` is the GPU if there is one.

    Raises:
        ValueError: when there is no such device here.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"--device {name} cannot be used: {reason}") from None
    return device


def seed_generators(seed: int, device: torch.device) -> None:
    """Seed torch's own generators, on the CPU and on the device, so that what is drawn can be drawn again.

    `torch.manual_seed` also asks after accelerators that nobody uses: it notes the call's stack for each,
    a sixth of all the time that a run of the suite took.
    """
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.manual_seed_all(seed)
    elif device.type != "cpu":
        torch.manual_seed(seed)


def device_of_worker(device: torch.device, worker: str | None, count: int) -> torch.device:
    """The GPU of one of several processes: they take turns, unless the user named one.

    Args:
        device: what `--device` means; `cuda` without a number leaves the choice to us.
        worker: pytest-xdist's name of the process, such as `gw3`; None outside of it.
        count: the number of GPUs.
    """
    number = re.search(r"\d+$", worker or "")
    named = device != torch.device(device.type)
    if device.type != "cuda" or named or number is None or count < 2:
        return device
    return torch.device("cuda", int(number[0]) % count)


def device_name(device: torch.device) -> str:
    """As people call it: the GPU's model, or the device's type."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)

"""Where something was measured: what of the machine and of the libraries decides the figures."""

from __future__ import annotations

import os
import platform
from importlib import metadata
from pathlib import Path

import torch

from conformance.devices import device_name

_PACKAGES = ("torch", "bitsandbytes", "peft")


def processor() -> str:
    """The processor as its maker calls it, with the instructions that decide which kernels run."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:  # not Linux
        return platform.processor() or platform.machine()
    said = dict(line.split(":", 1) for line in text.split("\n\n")[0].splitlines() if ":" in line)
    facts = {key.strip(): value.strip() for key, value in said.items()}
    flags = [
        flag for flag in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if flag in _flags(facts)
    ]
    return f"{facts.get('model name', platform.machine())} ({', '.join(flags) or 'no AVX'})"


def description(device: torch.device, threads: int, clock: str) -> dict[str, str | int]:
    """Device, processor, threads, clock and versions."""
    found: dict[str, str | int] = {
        "device": device_name(device),
        "processor": processor(),
        "cores": os.cpu_count() or 0,
        "threads": threads,
        "clock": clock,
        "python": platform.python_version(),
    }
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def _flags(facts: dict[str, str]) -> set[str]:
    return set(facts.get("flags", "").split())

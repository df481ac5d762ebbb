"""The settings that results of benchmarks are written with in tests."""

from __future__ import annotations

SETTINGS = {
    "device": "cpu",
    "processor": "p",
    "cores": 2,
    "threads": 1,
    "clock": "cpu",
    "python": "3",
}

"""A ratio of error to bound in few characters."""

from __future__ import annotations

import math


def shown(ratio: float) -> str:
    """Two decimals up to 100, then a power of ten; nothing for 0, where no error was seen."""
    if ratio == 0:
        return ""
    if not math.isfinite(ratio):
        return "∞"
    return f"{ratio:.2f}" if ratio < 100 else f"{ratio:.0e}"

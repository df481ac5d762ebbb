"""The distribution of error / bound as the geometry of a small plot: a strip per dtype, the bound marked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from conformance.margin import BINS, Margin
from conformance.ratio import shown

LEFT, STEP, HEIGHT, GAP = 4, 15, 34, 26
BOUND = LEFT + BINS * STEP
# What is above the bound stands apart, and may be anywhere up to infinity.
BEYOND = BOUND + 10
WIDTH = BEYOND + 2 * STEP + LEFT


@dataclass(frozen=True)
class Strip:
    """One dtype: where its strip starts, an SVG path of its bars up to the bound, and one beyond."""

    margin: Margin
    top: int
    inside: str
    beyond: str

    @property
    def label(self) -> str:
        m = self.margin
        tensors = "tensor" if m.count == 1 else "tensors"
        return f"{m.dtype}: {m.count} {tensors}, median {_words(m.median)}, worst {_words(m.worst)}"

    @property
    def base(self) -> int:
        return self.top + HEIGHT


@dataclass(frozen=True)
class Plot:
    """The strips of one layer, one below the other, over one axis."""

    strips: tuple[Strip, ...]
    ticks: tuple[tuple[int, str], ...]
    bound: int = BOUND
    beyond: int = BEYOND
    step: int = STEP
    left: int = LEFT
    width: int = WIDTH

    @property
    def base(self) -> int:
        return self.strips[-1].base

    @property
    def height(self) -> int:
        return self.base + 34

    @property
    def label(self) -> str:
        """The plot in words."""
        return "Error / bound. " + "; ".join(strip.label for strip in self.strips) + "."


def plot(margins: Sequence[Margin]) -> Plot:
    """The plot of one clause under one layer; at least one margin."""
    strips = tuple(_strip(m, GAP + i * (HEIGHT + GAP)) for i, m in enumerate(margins))
    ticks = tuple((LEFT + i * BINS * STEP // 4, f"{i / 4:g}") for i in range(5))
    return Plot(strips, (*ticks, (BEYOND + STEP, "> 1")))


def _strip(margin: Margin, top: int) -> Strip:
    tallest = max(margin.bins)
    base = top + HEIGHT
    bars = [_bar(LEFT + i * STEP, STEP, base, n, tallest) for i, n in enumerate(margin.bins[:BINS])]
    beyond = _bar(BEYOND, 2 * STEP, base, margin.bins[BINS], tallest)
    return Strip(margin, top, "".join(bars), beyond)


def _bar(left: int, width: int, base: int, count: int, tallest: int) -> str:
    """A bar as a path; a single tensor among thousands still shows."""
    if count == 0:
        return ""
    height = max(2.0, round(HEIGHT * count / tallest, 1))
    return f"M{left + 0.5:g} {base}v{-height:g}h{width - 1}v{height:g}z"


def _words(ratio: float) -> str:
    """A ratio in a sentence, where a small one is not to be read as none."""
    return "below 0.01" if 0 < ratio < 0.005 else shown(ratio) or "0"

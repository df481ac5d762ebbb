"""What a run of the examples saw, step by step: progress on the terminal, a file, and a plot."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

WINDOW = 10  # steps that a loss is averaged over before it is told: one batch is noisy


@dataclass
class History:
    """What each step saw and took, and the recall on the pairs that were held out."""

    losses: list[float] = field(default_factory=list)
    budgets: list[int] = field(default_factory=list)
    ranks: list[dict[str, int]] = field(default_factory=list)
    cpu_seconds: list[float] = field(default_factory=list)
    recall_before: float = 0.0
    recall_after: float = 0.0

    def note(self, loss: Tensor, budget: int, ranks: dict[str, int]) -> None:
        self.losses.append(loss.item())
        self.budgets.append(budget)
        self.ranks.append(ranks)

    def mean_loss(self, window: int) -> float:
        """Of the first steps; of the last, if the window is negative."""
        losses = self.losses[:window] if window > 0 else self.losses[window:]
        return sum(losses) / len(losses)

    def save(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self)) + "\n", encoding="utf-8")


def steps_of(history: History, steps: int) -> Iterator[int]:
    """The number of each step, from 1, with progress on the terminal; and the time it took."""
    text = TextColumn("loss {task.fields[loss]:.3f}  budget {task.fields[budget]}")
    with Progress(BarColumn(), MofNCompleteColumn(), text, TimeRemainingColumn()) as progress:
        task = progress.add_task("", total=steps, loss=float("nan"), budget="")
        for step in range(1, steps + 1):
            # This process's own time, which other work on the machine does not count towards.
            before = time.process_time()
            yield step
            history.cpu_seconds.append(time.process_time() - before)
            budget = history.budgets[-1]
            progress.update(task, advance=1, loss=history.mean_loss(-WINDOW), budget=budget)


def plot_ranks(history: History, path: Path) -> None:
    """The budget over the steps, and below it the rank of each layer, one row per layer."""
    names = [name.removeprefix("encoder.layer.") for name in history.ranks[0]]
    ranks = [[at_step[name] for at_step in history.ranks] for name in history.ranks[0]]
    steps = range(1, len(history.ranks) + 1)
    figure = Figure(figsize=(8, 9), layout="constrained")
    above, below = figure.subplots(2, 1, height_ratios=(1, 6), sharex=True)
    above.plot(steps, history.budgets, label="budget")
    above.plot(steps, [sum(at_step.values()) for at_step in history.ranks], "k:", label="ranks")
    above.set_ylabel("in all layers")
    above.set_ylim(bottom=0)
    above.legend()
    extent = (0.5, len(steps) + 0.5, len(names) - 0.5, -0.5)
    image = below.imshow(ranks, aspect="auto", interpolation="nearest", extent=extent)
    below.set_yticks(range(len(names)), names, fontsize=6)
    below.set_xlabel("step")
    figure.colorbar(image, ax=below, label="rank")
    save_figure(figure, path)


def save_figure(figure: Figure, path: Path) -> None:
    """Write it with text as text, the same bytes for the same numbers."""
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "qsvd"}):
        figure.savefig(path, metadata={"Date": None})

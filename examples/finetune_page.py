"""Run `finetune.py` and `finetune_with_peft.py` side by side, and write docs/finetune.md of it.

OMP_NUM_THREADS=1 python examples/finetune_page.py             # half an hour
python examples/finetune_page.py --write                       # the page again, of the same runs
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from statistics import fmean

from code_search import ROOT
from finetune_runs import BATCH, ENGINES, MEMORY_STEPS, Run, measure, read_run
from history import WINDOW, History, plot_ranks, save_figure
from matplotlib.figure import Figure

DOCS = ROOT / "docs"
KINDS = (
    "attention.self.query",
    "attention.self.key",
    "attention.self.value",
    "attention.output.dense",
    "intermediate.dense",
    "output.dense",
)
NAMES = {"qsvd": "`qsvd`", "peft": "PEFT", "accelerated": "PEFT, `accelerate`d"}


def write_page(folder: Path, docs: Path = DOCS) -> None:
    """Write docs/finetune.md and its two plots."""
    memory = {e: read_run(folder / f"memory-{e}.json").memory_mib for e in ENGINES}
    runs = {e: [read_run(p) for p in sorted(folder.glob(f"run-{e}-*.json"))] for e in ENGINES}
    other = read_run(folder / "other.json")
    plot_ranks(runs["qsvd"][0].history, docs / "finetune-ranks.svg")
    plot_losses(
        {e: r[0].history for e, r in runs.items()}, other.history, docs / "finetune-loss.svg"
    )
    text = "\n".join([*lesson(runs["qsvd"][0]), *comparison(runs, other, memory)]) + "\n"
    (docs / "finetune.md").write_text(text, encoding="utf-8")


def plot_losses(histories: Mapping[str, History], other: History, path: Path) -> None:
    """The loss, averaged over a few steps, of each engine, and of qsvd from other first values."""
    figure = Figure(figsize=(8, 3.5), layout="constrained")
    axes = figure.subplots()
    styles = {"qsvd": {"lw": 4, "alpha": 0.4}, "peft": {}, "accelerated": {"ls": ":", "c": "k"}}
    for engine, history in histories.items():
        axes.plot(*averaged(history), label=NAMES[engine].replace("`", ""), **styles[engine])
    axes.plot(*averaged(other), "--", c="grey", lw=1, label="qsvd, other first values")
    axes.set_xlabel("step")
    axes.set_ylabel(f"loss, mean of {WINDOW} steps")
    axes.set_ylim(bottom=0)
    axes.legend()
    save_figure(figure, path)


def averaged(history: History) -> tuple[Sequence[int], Sequence[float]]:
    steps = range(WINDOW, len(history.losses) + 1)
    return steps, [fmean(history.losses[step - WINDOW : step]) for step in steps]


def lesson(run: Run) -> Iterator[str]:
    """What the example did."""
    history = run.history
    first, last = history.ranks[0], history.ranks[-1]
    found = f"{history.recall_before:.0%} first before, and {history.recall_after:.0%} after"
    kept = f"{min(last.values())} to {max(last.values())} in a layer"
    before, after = history.mean_loss(WINDOW), history.mean_loss(-WINDOW)
    packages = ("torch", "bitsandbytes", "peft", "transformers")
    yield f"""\
# A real encoder, fine-tuned in 4-bit

Written by `python examples/finetune_page.py`: do not edit. Measured on the CPU (threads: {run.threads}) with
{", ".join(f"{name} {version(name)}" for name in packages)}.

[examples/finetune.py](../examples/finetune.py) teaches all-MiniLM-L6-v2, its six blocks in nf4, to find
the function that a docstring was written for. The text is this repository's: {run.seen} functions
to learn from, and {run.held_out} that are held out. AdaLoRA starts with 8 ranks in each of {len(first)}
layers; {len(history.losses)} steps of {BATCH} pairs later, 4 are left on average.

- The loss, {WINDOW} steps averaged, went from {before:.2f} to {after:.2f}.
- Of the {run.held_out} functions held out, it found {found}.
- Of {sum(first.values())} ranks {sum(last.values())} are left, {kept}.
- PEFT, given the saved adapter, computes the same embeddings within {run.difference:.1e}.

![The budget, and the rank of each layer, over the steps](finetune-ranks.svg)

The budget falls as a cube. Dark rows are layers that lost their ranks to others.

| layers | mean rank at the end |
|---|---:|"""
    for kind in KINDS:
        ranks = [r for name, r in last.items() if name.split(".", 3)[-1] == kind]
        yield f"| `{kind}` | {fmean(ranks):.1f} |"
    yield ""


def comparison(
    runs: Mapping[str, Sequence[Run]], other: Run, memory: Mapping[str, float]
) -> Iterator[str]:
    """The same run by each engine."""
    ours = runs["qsvd"][0].history
    steps, turns = len(ours.losses), len(runs["qsvd"])
    yield f"""\
## PEFT beside it

[examples/finetune_with_peft.py](../examples/finetune_with_peft.py) is the same run with PEFT, from the
same first values. `accelerate`d is PEFT's model, its layers computing as qsvd's do.

![The loss of each](finetune-loss.svg)

| | last loss, {WINDOW} steps | recall | CPU seconds a step | memory of a step |
|---|---:|---:|---:|---:|"""
    for engine, name in NAMES.items():
        history = runs[engine][0].history
        cpu = min(r.history.cpu_seconds for r in runs[engine]) / steps
        yield (
            f"| {name} | {history.mean_loss(-WINDOW):.4f} | {history.recall_after:.3f} "
            f"| {cpu:.2f} | {memory[engine]:.0f} MiB |"
        )
    yield f"""
Time is what the process itself took of the CPU, whatever else the machine did, per step and averaged
over a run (runs: {turns}; the least counts). Memory is the peak of the resident size in {MEMORY_STEPS} steps, above
what it was before the adapters were made. The model computes in fp32, where PEFT has no need of
the fp32 copies of inputs that it makes in bf16 and fp16.

| against `qsvd` | largest difference of a loss | ranks differ in |
|---|---:|---:|"""
    for engine in ("peft", "accelerated"):
        yield against(NAMES[engine], ours, runs[engine][0].history)
    yield against("`qsvd`, other first values", ours, other.history)
    yield """
The last row is the noise: what a run changes by if only its adapters start with other random values."""


def against(name: str, one: History, two: History) -> str:
    """A row: how far two runs are apart, in the loss of a step and in the steps whose ranks differ."""
    loss = max(abs(a - b) for a, b in zip(one.losses, two.losses, strict=True))
    steps = sum(a != b for a, b in zip(one.ranks, two.ranks, strict=True))
    return f"| {name} | {loss:.1e} | {steps} of {len(one.ranks)} steps |"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--folder", type=Path, default=Path("finetuned-page"), help="for the runs")
    parser.add_argument("--write", action="store_true", help="only the page, from the last runs")
    options = parser.parse_args(arguments)
    if not options.write:
        measure(options.folder, options.steps, options.repeats)
    write_page(options.folder)


if __name__ == "__main__":
    main()

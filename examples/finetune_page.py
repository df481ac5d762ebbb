"""Run `finetune.py` and `finetune_with_peft.py` side by side, and write docs/finetune.md of it.

OMP_NUM_THREADS=1 python examples/finetune_page.py             # half an hour of CPU time
python examples/finetune_page.py --write                       # the page again, of the same runs
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import version
from itertools import combinations
from pathlib import Path
from statistics import fmean, median

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


def write_page(folder: Path, docs: Path) -> None:
    """Write finetune.md and its two plots into `docs`."""
    memory = {e: read_run(folder / f"memory-{e}.json").memory_mib for e in ENGINES}
    times = {e: read_run(folder / f"time-{e}.json").history.cpu_seconds for e in ENGINES}
    runs = read_runs(folder)
    plot_ranks(runs["qsvd"][0].history, docs / "finetune-ranks.svg")
    plot_losses(runs, docs / "finetune-loss.svg")
    text = (
        "\n".join([*lesson(runs["qsvd"][0]), *comparison(runs, times, memory), *noise(runs)]) + "\n"
    )
    (docs / "finetune.md").write_text(text, encoding="utf-8")


def read_runs(folder: Path) -> dict[str, list[Run]]:
    """The whole runs of each engine that has any, by seed from 0."""
    files = {e: sorted(folder.glob(f"run-{e}-*.json")) for e in ENGINES}
    return {e: [read_run(path) for path in paths] for e, paths in files.items() if paths}


def plot_losses(runs: Mapping[str, Sequence[Run]], path: Path) -> None:
    """The loss, averaged over a few steps, from each seed's first values: qsvd's, and PEFT's on it."""
    figure = Figure(figsize=(8, 3.5), layout="constrained")
    axes = figure.subplots()
    for seed, run in enumerate(runs["qsvd"]):
        axes.plot(*averaged(run.history), lw=4, alpha=0.4, label=f"qsvd, seed {seed}")
    for seed, run in enumerate(runs["peft"]):
        axes.plot(*averaged(run.history), ":", c="k", lw=1.5, label=f"PEFT, seed {seed}")
    axes.set_xlabel("step")
    axes.set_ylabel(f"loss, mean of {WINDOW} steps")
    axes.set_ylim(bottom=0)
    axes.legend()
    save_figure(figure, path)


def averaged(history: History) -> tuple[Sequence[int], Sequence[float]]:
    steps = range(WINDOW, len(history.losses) + 1)
    return steps, [fmean(history.losses[step - WINDOW : step]) for step in steps]


def lesson(run: Run) -> Iterator[str]:
    """What the example did, from the first values that it draws itself."""
    history = run.history
    first, last = history.ranks[0], history.ranks[-1]
    found = f"{history.recall_before:.0%} first before, and {history.recall_after:.0%} after"
    kept = f"{min(last.values())} to {max(last.values())} in a layer"
    before, after = history.mean_loss(WINDOW), history.mean_loss(-WINDOW)
    minutes = sum(history.cpu_seconds) / 60
    packages = ("torch", "bitsandbytes", "peft", "transformers")
    yield f"""\
# A real encoder, fine-tuned in 4-bit

Written by `python examples/finetune_page.py`: do not edit. Measured on the CPU (threads: {run.threads}) with
{", ".join(f"{name} {version(name)}" for name in packages)}.

[examples/finetune.py](../examples/finetune.py) teaches all-MiniLM-L6-v2, its six blocks in nf4, to find
the function that a docstring was written for. The text is this repository's: {run.seen} functions
to learn from, and {run.held_out} that are held out. AdaLoRA starts with 8 ranks in each of {len(first)}
layers; {len(history.losses)} steps of {BATCH} pairs later, 4 are left on average. That takes
{minutes:.1f} minutes of CPU time.

- The loss, {WINDOW} steps averaged, went from {before:.2f} to {after:.2f}.
- Of the {run.held_out} functions held out, it found {found}.
- Of {sum(first.values())} ranks {sum(last.values())} are left, {kept}.
- PEFT, given the saved adapter, computes the same embeddings within {run.difference:.1e}.

![The budget, and the rank of each layer, over the steps](finetune-ranks.svg)

The budget falls as a cube, and every fifth step the ranks follow it. Dark rows are layers that lost
their ranks to others.

| layers | mean rank at the end |
|---|---:|"""
    for kind in KINDS:
        ranks = [r for name, r in last.items() if name.split(".", 3)[-1] == kind]
        yield f"| `{kind}` | {fmean(ranks):.1f} |"
    yield ""


def comparison(
    runs: Mapping[str, Sequence[Run]],
    times: Mapping[str, Sequence[float]],
    memory: Mapping[str, float],
) -> Iterator[str]:
    """The same runs by each engine."""
    yield f"""\
## PEFT beside it

[examples/finetune_with_peft.py](../examples/finetune_with_peft.py) is the same run with PEFT, from the
same first values. `accelerate`d is PEFT's model, its layers computing as qsvd's do.

| | last loss, {WINDOW} steps | recall, held out | CPU seconds a step | of `qsvd`'s | memory |
|---|---:|---:|---:|---:|---:|"""
    for engine, name in NAMES.items():
        learnt = "| | |"
        if engine in runs:
            history = runs[engine][0].history
            learnt = f"| {history.mean_loss(-WINDOW):.4f} | {history.recall_after:.3f} |"
        ratio = median(a / b for a, b in zip(times[engine], times["qsvd"], strict=True))
        seconds = f"{median(times[engine]):.2f} | {ratio:.2f}"
        yield f"| {name} {learnt} {seconds} | {memory[engine]:.0f} MiB |"
    yield f"""
Loss and recall are those of seed 0. Time is what a process itself took of the CPU, the median of
{len(times["qsvd"])} steps; the engines took them in turns, and the ratio is the median of the steps'
ratios. Memory is the peak of the resident size in {MEMORY_STEPS} steps, above what it was before the
adapters were made. The model computes in fp32, where PEFT has no need of the fp32 copies of inputs that
it makes in bf16 and fp16."""
    if len(runs) < len(NAMES):
        yield "Where the loss is left out, only time and memory were measured."


def noise(runs: Mapping[str, Sequence[Run]]) -> Iterator[str]:
    """How far the libraries are apart, against how far qsvd is from itself with other first values."""
    ours = runs["qsvd"]
    yield f"""
## The same curve

![The loss of each seed, by qsvd and by PEFT](finetune-loss.svg)

Adapters start with random A and B, here of {len(ours)} seeds, and see the same texts in the same order.

| compared | seeds | largest difference of a step's loss | steps in which a layer's rank differs |
|---|---|---:|---:|"""
    for engine, theirs in runs.items():
        if engine == "qsvd":
            continue
        for seed, (a, b) in enumerate(zip(ours, theirs, strict=False)):
            yield f"| {NAMES[engine]} and `qsvd` | {seed} | {difference(a.history, b.history)} |"
    for (i, a), (j, b) in combinations(enumerate(ours), 2):
        yield f"| `qsvd` and `qsvd` | {i} and {j} | {difference(a.history, b.history)} |"
    yield """
The rows of `qsvd` alone are the noise: what a run changes by if only its adapters start with other values."""


def difference(one: History, two: History) -> str:
    """Of the losses of a step at most, and in how many steps a layer's rank differs, as two cells."""
    loss = max(abs(a - b) for a, b in zip(one.losses, two.losses, strict=True))
    steps = sum(a != b for a, b in zip(one.ranks, two.ranks, strict=True))
    return f"{loss:.1e} | {steps} of {len(one.losses)}"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--seeds", type=int, default=3, help="of first values, 2 or more (3)")
    parser.add_argument("--folder", type=Path, default=Path("finetuned-page"), help="for the runs")
    parser.add_argument("--write", action="store_true", help="only the page, from the last runs")
    options = parser.parse_args(arguments)
    if not options.write:
        measure(options.folder, options.steps, options.seeds)
    write_page(options.folder, DOCS)


if __name__ == "__main__":
    main()

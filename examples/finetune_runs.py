"""The runs of `finetune.py` and `finetune_with_peft.py` that docs/finetune.md is about.

Each has a process of its own. Losses and ranks come from whole runs, of several seeds. Times come from
short ones that take turns, step by step; memory from short ones in which freed memory is given back at
once, so that what is resident is what is in use.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import finetune
import finetune_with_peft
import torch
from code_search import batches_of, load_model, read_pairs, recall, split
from history import History
from turns import in_turn, run_in_turns

import qsvd

ENGINES = ("qsvd", "peft", "accelerated")
MEMORY_STEPS = 12
TIMED_STEPS = 16
BATCH = 16


@dataclass(frozen=True)
class Run:
    """One run: what it saw, and the peak of its memory above what it began with.

    seen, held_out: how many pairs. difference: of an embedding, at most, between the trained model
    and PEFT's reading of its file; only of a run by qsvd.
    """

    history: History
    memory_mib: float
    difference: float | None
    seen: int
    held_out: int
    threads: int


def run(engine: str, steps: int, seed: int, turns: bool) -> Run:
    """Train here and now; with `turns`, each step when its turn comes."""
    seen, held_out = split(read_pairs())
    config = finetune.configure(steps)
    start = finetune_with_peft.first_values(config, seed)  # all have it, for an equal footing
    model = load_model()
    history = History(recall_before=recall(model, held_out))
    batches = batches_of(seen, BATCH, model.device)
    if turns:
        batches = in_turn(batches)
    before = reset_peak()
    if engine == "qsvd":
        torch.manual_seed(seed)
        finetune.train(model, config, batches, history)
    else:
        accelerated = engine == "accelerated"
        model = finetune_with_peft.train(model, config, batches, history, start, accelerated)
    peak = status("VmHWM")
    history.recall_after = recall(model, held_out)
    difference = None
    if engine == "qsvd":
        with tempfile.TemporaryDirectory() as folder:
            qsvd.save_adapter(model, folder)
            difference = finetune.difference_in_peft(model, Path(folder), held_out)
    counts = (len(seen), len(held_out), torch.get_num_threads())
    return Run(history, peak - before, difference, *counts)


def reset_peak() -> float:
    """Forget the largest resident size so far (Linux), and return the present one in MiB."""
    Path("/proc/self/clear_refs").write_text("5")
    return status("VmRSS")


def status(field: str) -> float:
    """A size of this process in MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(field))


def command(result: Path, engine: str, steps: int, seed: int = 0) -> list[str]:
    """What trains in a new process, and leaves a file of it."""
    options = (f"--run={engine}", f"--steps={steps}", f"--seed={seed}", f"--result={result}")
    return [sys.executable, __file__, *options]


def read_run(result: Path) -> Run:
    found = json.loads(result.read_text(encoding="utf-8"))
    return Run(**{**found, "history": History(**found["history"])})


def measure(folder: Path, steps: int, seeds: int) -> None:
    """Run everything."""
    folder.mkdir(parents=True, exist_ok=True)
    for left_over in folder.glob("run-*.json"):  # of more seeds than these
        left_over.unlink()
    trimmed = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}  # larger blocks go back at once
    for engine in ENGINES:
        short = command(folder / f"memory-{engine}.json", engine, MEMORY_STEPS)
        subprocess.run(short, env=trimmed, check=True)
    timed = [command(folder / f"time-{e}.json", e, TIMED_STEPS) for e in ENGINES]
    run_in_turns([[*run, "--turns"] for run in timed])
    for seed in range(seeds):
        for engine in ENGINES:
            whole = command(folder / f"run-{engine}-{seed}.json", engine, steps, seed)
            subprocess.run(whole, check=True)


def main(arguments: Sequence[str] | None = None) -> None:
    """What one process does."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--run", choices=ENGINES, required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--seed", type=int, default=0, help="of the adapters' first values")
    parser.add_argument("--turns", action="store_true", help="wait before each step for a line")
    parser.add_argument("--result", type=Path, required=True, help="JSON file to write")
    options = parser.parse_args(arguments)
    found = run(options.run, options.steps, options.seed, options.turns)
    options.result.write_text(json.dumps(asdict(found)) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

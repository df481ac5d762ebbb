"""A run: cases in chunks, each kept on disk as soon as it is judged, so that a run can be taken up again."""

from __future__ import annotations

import hashlib
import inspect
import logging
import multiprocessing
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from pathlib import Path

import numpy as np
import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from conformance import case, oracle, strategies, values
from reference import adapter, adapter_bounds, base_bounds, chain, domain, formats, singular
from tests.calibration import drawing, judging
from tests.calibration.drawing import case_of
from tests.calibration.judging import OPERATIONS, RULES, implementations, judge
from tests.mutants import honest, variants

CHUNK = 50
NOT_JUDGED = np.nan
Chunk = tuple[int, int, int, Path]  # seed, first case, number of cases, where they are kept
# What decides a case, its bounds, and what is held to them.
MEASURED = (
    *(adapter, adapter_bounds, base_bounds, chain, domain, formats, singular),
    *(case, oracle, strategies, values, drawing, judging, honest, variants),
)


def ratios(cases: int, seed: int, processes: int, work: Path) -> np.ndarray:
    """Error / bound of `cases` cases: (cases, implementations, rules, operations).

    NaN where an implementation was not judged by a rule, or the case is outside of its domain.
    """
    folder = work / f"seed-{seed}-{_fingerprint()}"
    folder.mkdir(parents=True, exist_ok=True)
    size = min(CHUNK, cases)
    chunks = [_path(folder, start, size) for start in range(0, cases, size)]
    missing = [number for number, path in enumerate(chunks) if not path.exists()]
    with _progress() as progress:
        task = progress.add_task(
            "calibrating", total=len(chunks) * size, completed=(len(chunks) - len(missing)) * size
        )
        for _ in _judged([(seed, n * size, size, chunks[n]) for n in missing], processes):
            progress.advance(task, size)
    return np.concatenate([np.load(path) for path in chunks])[:cases]


def _judged(chunks: list[Chunk], processes: int) -> Iterator[None]:
    """Judge the missing chunks, in this process or in several."""
    if processes == 1 or len(chunks) < 2:
        for chunk in chunks:
            yield judge_chunk(*chunk)
        return
    context = multiprocessing.get_context("spawn")  # torch's threads do not survive a fork
    with ProcessPoolExecutor(processes, mp_context=context, initializer=_quiet) as pool:
        futures: list[Future[None]] = [pool.submit(judge_chunk, *chunk) for chunk in chunks]
        for future in as_completed(futures):
            yield future.result()


def judge_chunk(seed: int, start: int, size: int, path: Path) -> None:
    """Judge `size` cases, and keep what was found in `path`."""
    names = {name: i for i, name in enumerate(implementations())}
    found = np.full((size, len(names), len(RULES), len(OPERATIONS)), NOT_JUDGED, np.float32)
    for number in range(size):
        for name, rule, operation, ratio in judge(case_of(seed, start + number)):
            found[number, names[name], RULES.index(rule), OPERATIONS.index(operation)] = ratio
    # Whole or not at all: a run may be interrupted at any time.
    partial = path.with_suffix(".partial.npy")
    np.save(partial, found)
    partial.rename(path)


def _path(folder: Path, start: int, size: int) -> Path:
    return folder / f"cases-{start:06d}-{size}.npy"


def _quiet() -> None:
    torch.set_num_threads(1)
    logging.getLogger("torch._dynamo").setLevel(logging.ERROR)


def _fingerprint() -> str:
    """A name for what is measured, so that no chunk of another bound or another layer is taken up."""
    digest = hashlib.sha256()
    for module in MEASURED:
        digest.update(inspect.getsource(module).encode())
    digest.update(" ".join([torch.__version__, *implementations()]).encode())
    return digest.hexdigest()[:12]


def _progress() -> Progress:
    return Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    )

"""The measurement as a whole: shared out over processes, and resumed where it was interrupted."""

from __future__ import annotations

import hashlib
import json
import logging
import multiprocessing
import os
import platform
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from conformance.case import DTYPES, DType
from conformance.spec import KINDS, Kind

ROOT = Path(__file__).resolve().parents[2]
# Whatever is changed here may change a figure, but for what is written of it.
SOURCES = ("reference", "conformance", "qsvd", "tests/mutants", "tests/field", "tests/reference")
HARMLESS = ("page.py", "results.py", "__main__.py")


@dataclass(frozen=True)
class Plan:
    """How much is measured. `clauses` asks the whole clause set, too."""

    seeds: int = 3
    random: int = 12
    kinds: tuple[Kind, ...] = KINDS
    dtypes: tuple[DType, ...] = DTYPES
    clauses: bool = True
    mutants: tuple[str, ...] | None = None


def settings(plan: Plan) -> dict[str, Any]:
    """What the figures were made of."""
    versions = {"python": platform.python_version()}
    for package in ("torch", "bitsandbytes", "numpy", "hypothesis", "peft"):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    layers = list(plan.kinds)
    return {"seeds": plan.seeds, "random": plan.random, "layers": layers, "versions": versions}


def digest(plan: Plan) -> str:
    """Names the cache: the same sizes, sources and versions find what they found before."""
    sizes = {"random": plan.random, "mutants": plan.mutants}
    told = hashlib.sha256(json.dumps([sizes, settings(plan)["versions"]]).encode())
    for folder in SOURCES:
        for path in sorted((ROOT / folder).rglob("*.py")):
            if path.name not in HARMLESS and not path.name.startswith("test_"):
                told.update(path.relative_to(ROOT).as_posix().encode() + path.read_bytes())
    return told.hexdigest()[:16]


class Store:
    """Finished pieces of a measurement, one small JSON file each."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def get(self, name: str) -> Any:
        path = self.folder / f"{name}.json"
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None

    def put(self, name: str, value: Any) -> Any:
        path, new = self.folder / f"{name}.json", self.folder / f"{name}.new"
        new.write_text(json.dumps(value), encoding="utf-8")
        new.replace(path)  # an interruption leaves the whole file, or none
        return value


Task = tuple[str, Callable[..., Any], tuple[Any, ...]]


def run(tasks: Sequence[Task], store: Store, jobs: int, what: str) -> dict[str, Any]:
    """Results by task name: those in the store, and the others from `jobs` processes."""
    done = {name: found for name, _, _ in tasks if (found := store.get(name)) is not None}
    waiting = [task for task in tasks if task[0] not in done]
    with _progress() as progress:
        bar = progress.add_task(what, total=len(tasks), completed=len(done))
        for name, value in _results(waiting, jobs):
            done[name] = store.put(name, value)
            progress.advance(bar)
    return {name: done[name] for name, _, _ in tasks}


def _results(tasks: Sequence[Task], jobs: int) -> Iterator[tuple[str, Any]]:
    if jobs == 1:
        _settle()
        for name, function, arguments in tasks:
            yield name, function(*arguments)
        return
    # Not forked: torch's threads do not survive that.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, context, _settle) as pool:
        futures: dict[Future[Any], str] = {
            pool.submit(function, *arguments): name for name, function, arguments in tasks
        }
        for future in as_completed(futures):
            yield futures[future], future.result()


def _settle() -> None:
    """One thread for each process, the same sums every time, and no chatter of compilers."""
    import torch

    os.environ["CI"] = "1"  # hypothesis keeps no examples from one measurement to the next
    torch.set_num_threads(1)
    logging.getLogger("torch._dynamo").setLevel(logging.ERROR)


@contextmanager
def _progress() -> Iterator[Progress]:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, transient=True) as progress:
        yield progress

"""A function run by several processes of one gloo group, or a script under torchrun, and what they say.

The processes are forked from a server that has imported torch and bitsandbytes once, so a group of four
starts in half a second. They meet over a file, so no port is chosen by us, and a process that
hangs is killed with its group.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import distributed as dist
from tqdm import tqdm

TIMEOUT = 120.0  # seconds; what the tests ask takes two on an idle machine
_PRELOADED = [
    "torch",
    "bitsandbytes",
    "qsvd",
    "torch.distributed.fsdp",
    "accelerate",
    "tests.distributed.runs",
]
_SERVER = multiprocessing.get_context("forkserver")
_SERVER.set_forkserver_preload(_PRELOADED)


def run(
    world: int, function: Callable[..., Any], *args: Any, timeout: float = TIMEOUT
) -> list[Any]:
    """What `function(*args)` returns on each of `world` processes, by rank.

    Raises:
        AssertionError: if a process raised, died, or did not end in time, with its traceback.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with _started(folder, world, function, args) as processes:
            deadline = time.monotonic() + timeout
            for process in processes:
                process.join(max(0.0, deadline - time.monotonic()))
            late = [rank for rank, process in enumerate(processes) if process.is_alive()]
        failures = [path.read_text() for path in sorted(folder.glob("failure-*"))]
        assert not failures, "\n".join(failures)
        assert not late, f"processes {late} of {world} did not end within {timeout} s"
        died = {r: p.exitcode for r, p in enumerate(processes) if p.exitcode}
        assert not died, f"processes died, by rank: {died}"
        return [torch.load(folder / f"result-{r}.pt", weights_only=False) for r in range(world)]


def killed(
    world: int,
    victim: int,
    ready: Callable[[], bool],
    after: float,
    function: Callable[..., Any],
    *args: Any,
) -> None:
    """Let `world` processes run a function without end, and kill one so many seconds after `ready`.

    The others are given a second to do what they do then.

    Raises:
        AssertionError: if they are not ready in time, or one of them ended before.
    """
    with (
        tempfile.TemporaryDirectory() as name,
        _started(Path(name), world, function, args) as processes,
    ):
        deadline = time.monotonic() + TIMEOUT
        while not ready():
            assert time.monotonic() < deadline, f"not ready within {TIMEOUT} s"
            time.sleep(0.005)
        time.sleep(after)
        assert all(process.is_alive() for process in processes), "one ended by itself"
        processes[victim].kill()
        processes[victim].join()
        for process in processes:
            process.join(1.0)


def torchrun(world: int, script: Path, *arguments: str, gpus: bool = False) -> tuple[str, str]:
    """What a script prints, to both streams, under torchrun.

    Raises:
        AssertionError: if it fails, with what it printed.
    """
    root = Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    if not gpus:
        environment["CUDA_VISIBLE_DEVICES"] = ""
    options = ["--standalone", "--max-restarts=2", f"--nproc-per-node={world}"]
    process = subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", *options, str(root / script), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )
    try:
        out, err = process.communicate(timeout=2 * TIMEOUT)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGTERM)  # on which it ends the processes that it has started
        process.communicate(timeout=TIMEOUT)
        raise
    assert process.returncode == 0, err
    return out, err


@contextmanager
def _started(
    folder: Path, world: int, function: Callable[..., Any], args: tuple[Any, ...]
) -> Iterator[list[Any]]:
    """The processes of a group, none of which outlives the block."""
    processes = [
        _SERVER.Process(target=_work, args=(folder, rank, world, function, args), daemon=True)
        for rank in range(world)
    ]
    for process in processes:
        process.start()
    try:
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.join()


def _work(
    folder: Path, rank: int, world: int, function: Callable[..., Any], args: tuple[Any, ...]
) -> None:
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    tqdm.set_lock(threading.RLock())  # its own is a semaphore, which `os._exit` would leave behind
    torch.set_num_threads(1)
    torch.manual_seed(20260101)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder / 'store'}",
        rank=rank,
        world_size=world,
        timeout=timedelta(seconds=TIMEOUT / 2),
    )
    status = 1
    try:
        torch.save(function(*args), folder / f"result-{rank}.pt")
        dist.barrier()  # nobody leaves while another still talks to it
        status = 0
    except BaseException:
        text = f"process {rank} of {world}:\n{traceback.format_exc()}"
        (folder / f"failure-{rank}").write_text(text)
    # Without destructors: a DDP model that outlives its group may wait for gloo's thread for ever (torch
    # 2.13), and the others' collectives should fail at once, not at their time-out.
    os._exit(status)

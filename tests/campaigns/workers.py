"""Work in processes of its own: what one item does to torch's global state, no other one sees."""

from __future__ import annotations

import multiprocessing
import signal
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkProcess
from typing import Generic, TypeVar

T = TypeVar("T")
R = TypeVar("R")

# Forked, so that what was imported and compiled once serves every item.
_FORK = multiprocessing.get_context("fork")


class WorkerError(RuntimeError):
    """An item whose process raised, died or took too long: the message says which and how."""


@dataclass
class _Running(Generic[T]):
    item: T
    process: ForkProcess
    deadline: float


def forked(
    task: Callable[[T], R], items: Sequence[T], *, jobs: int, timeout: float
) -> Iterator[tuple[T, R]]:
    """The results of `task(item)`, each computed in a process of its own, as they come in.

    Items start in their order. When the caller stops iterating, the running processes end.

    Raises:
        WorkerError: when an item's process raises, dies, or runs longer than `timeout` seconds.
    """
    waiting = list(reversed(items))
    running: dict[Connection, _Running[T]] = {}
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                item = waiting.pop()
                receiver, sender = _FORK.Pipe(duplex=False)
                process = _FORK.Process(target=_serve, args=(task, item, sender))
                process.start()
                sender.close()
                running[receiver] = _Running(item, process, time.monotonic() + timeout)
            patience = min(one.deadline for one in running.values()) - time.monotonic()
            ready = wait(list(running), max(0.0, patience))
            if not ready:
                late = min(running.values(), key=lambda one: one.deadline)
                raise WorkerError(f"{late.item} took more than {timeout:.0f} seconds.")
            for receiver in ready:
                assert isinstance(receiver, Connection)
                yield _received(receiver, running.pop(receiver))
    finally:
        for one in running.values():
            one.process.kill()
        for one in running.values():
            one.process.join()


def _received(receiver: Connection, one: _Running[T]) -> tuple[T, R]:
    try:
        failed, result = receiver.recv()
    except EOFError:
        one.process.join()
        raise WorkerError(f"The process of {one.item} died: {one.process.exitcode}.") from None
    finally:
        receiver.close()
    one.process.join()
    if failed:
        raise WorkerError(f"{one.item} raised:\n{result}")
    return one.item, result


def _serve(task: Callable[[T], R], item: T, sender: Connection) -> None:
    # Ctrl-C is the parent's to handle; it ends its children.
    with suppress(ValueError):
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        answer: tuple[bool, object] = (False, task(item))
    except Exception:
        answer = (True, traceback.format_exc())
    sender.send(answer)

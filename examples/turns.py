"""Processes that take turns, step by step: whatever else slows the machine down is unfair to none of them."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator, Sequence
from typing import TypeAlias, TypeVar

TURN = "turn\n"  # said by a process before each of its steps; it waits for the answer

T = TypeVar("T")
Process: TypeAlias = "subprocess.Popen[str]"


def in_turn(items: Iterator[T]) -> Iterator[T]:
    """In a process: each item once the parent has said that it may be worked on."""
    for item in items:
        sys.stdout.write(TURN)
        sys.stdout.flush()
        sys.stdin.readline()
        yield item


def run_in_turns(commands: Sequence[Sequence[str]]) -> None:
    """In the parent: run all at once, of which one is at work at any time, once all are ready.

    Raises:
        CalledProcessError: if one fails, after the others have come to their ends.
    """
    pipe = subprocess.PIPE
    processes = [subprocess.Popen(c, stdin=pipe, stdout=pipe, text=True) for c in commands]
    waiting = [process for process in processes if _is_ready(process)]
    while waiting:
        waiting = [process for process in waiting if _take_turn(process)]
    for process in processes:
        process.communicate()
    for process in processes:
        if process.returncode:
            raise subprocess.CalledProcessError(process.returncode, process.args)


def _take_turn(process: Process) -> bool:
    """Let it take a step. False: it was the last one, and what follows is done as well."""
    assert process.stdin is not None
    process.stdin.write(TURN)
    process.stdin.flush()
    return _is_ready(process)


def _is_ready(process: Process) -> bool:
    """Read on, over the progress that it shows, until it asks for its turn or is at its end."""
    assert process.stdout is not None
    return TURN in process.stdout

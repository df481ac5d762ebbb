"""A child process that speaks JSON lines: started, heard with a time limit, killed with its family."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
from collections import deque
from typing import IO, Any

_BOOT = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
    "from conformance.worker import main; main()"
)
# Longer than any answer; a line beyond it is not one.
_LONGEST_LINE = 1 << 22
_KEPT = 1 << 15
# What the worker prints before it loads the port.
READY = "--- the port is loaded from here on ---"


class Silence(Exception):
    """The child said nothing for too long."""


class Gone(Exception):
    """The child is dead, or says what cannot be understood."""


class Child:
    """One worker process. What it prints is read and forgotten, but for the end."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", _BOOT, json.dumps(sys.path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
        self._heard: queue.SimpleQueue[bytes] = queue.SimpleQueue()
        self._printed: deque[bytes] = deque()
        assert self._process.stdout is not None
        assert self._process.stderr is not None
        self._threads = [
            threading.Thread(target=target, args=(stream,), daemon=True)
            for target, stream in (
                (self._listen, self._process.stdout),
                (self._drain, self._process.stderr),
            )
        ]
        for thread in self._threads:
            thread.start()

    def say(self, line: str) -> None:
        """Send one line.

        Raises:
            Gone: when the child is dead.
        """
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(line.encode() + b"\n")
            self._process.stdin.flush()
        except OSError:
            raise Gone from None

    def hear(self, seconds: float) -> dict[str, Any]:
        """The next object that the child says.

        Raises:
            Silence: when it says nothing for so long.
            Gone: when it is dead, or says something else than an object.
        """
        try:
            line = self._heard.get(timeout=seconds)
        except queue.Empty:
            raise Silence from None
        try:
            heard = json.loads(line)
        except ValueError:
            raise Gone from None
        if not isinstance(heard, dict):
            raise Gone
        return heard

    def kill(self, grace: float = 0.0) -> int:
        """End the child and whatever it started; returns its exit code, negative for a signal.

        grace: seconds that a dying child is given to say its own exit code.
        """
        try:
            self._process.wait(grace)
        except subprocess.TimeoutExpired:
            self._process.kill()
        code = self._process.wait()
        if hasattr(os, "killpg"):
            with contextlib.suppress(OSError):  # the family is gone already
                os.killpg(self._process.pid, signal.SIGKILL)
        for thread in self._threads:
            thread.join(timeout=1.0)
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):  # what was not sent yet interests nobody any more
            self._process.stdin.close()
        return code

    def last_words(self) -> str:
        """The end of what the port printed."""
        printed = b"".join(self._printed)[-_KEPT:].decode(errors="replace")
        return printed.rpartition(f"{READY}\n")[2]

    def _listen(self, stream: IO[bytes]) -> None:
        with stream:
            while line := stream.readline(_LONGEST_LINE):
                self._heard.put(line)
        self._heard.put(b"")  # no object: whoever waits learns that there is nobody

    def _drain(self, stream: IO[bytes]) -> None:
        with stream:
            while some := os.read(stream.fileno(), _KEPT):
                self._printed.append(some)
                while sum(map(len, self._printed)) - len(self._printed[0]) > _KEPT:
                    self._printed.popleft()

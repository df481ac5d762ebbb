"""The warden of a port: keeps it in a process of its own, asks it, and survives it."""

from __future__ import annotations

import re
import signal
from dataclasses import dataclass, fields
from typing import Protocol

from conformance.case import Case
from conformance.chapters import Test
from conformance.child import Child, Gone, Silence
from conformance.judge import NOT_PROVIDED, Answer, judge
from conformance.port import Port, PortError, load_port
from conformance.settings import Settings
from conformance.spec import KINDS, Kind, clause_of
from conformance.violation import Violation, short_path

UNKNOWN = "unknown"
# A port that hung so often, or died so often, is not started again: the run is to end.
MAX_HANGS = 3
MAX_DEATHS = 20
# The worker's own alarm, which says where it hangs, goes off first.
_GRACE = 5.0
# To import torch and this suite, from a slow disk and before any port is there to be blamed.
_STARTING = 600.0
_QUOTED_LINES = 5
_BLOCK = re.compile(
    r"^(?P<who>Current thread|Thread) .*\(most recent call first\):\n(?P<frames>(?:  .+\n?)+)",
    re.MULTILINE,
)
_FRAME = re.compile(r'^  File "(.+)", line (\d+) in (.+)$', re.MULTILINE)
# Whoever called torch or the standard library is named, and not the line there.
_LIBRARY = re.compile(r"/torch/|/lib/python[\d.]+/(?!site-packages)")
# faulthandler's report is told in one line of our own; it has addresses, which differ between runs.
_REPORT = re.compile(r"^(Fatal Python error: |Timeout \(|(Current thread|Thread) 0x)", re.MULTILINE)


@dataclass(frozen=True)
class Introduction:
    """What a port says of itself; `lost` is why it could not even say that."""

    version: str
    kinds: tuple[Kind, ...]
    arithmetic: str = ""
    lost: str = ""


class Host(Protocol):
    """Where a port lives and can be asked: in this process or in another.

    `version` is the port's, once it has introduced itself.
    """

    version: str

    def start(self) -> None: ...

    def introduce(self) -> Introduction: ...

    def ask(self, test: Test, kind: Kind) -> Answer: ...

    def stop(self) -> None: ...


class SameProcess:
    """A port in this process, for debuggers and for measuring coverage: nothing guards against it."""

    def __init__(self, settings: Settings) -> None:
        self.version = UNKNOWN
        self._settings = settings
        self._port: Port | None = None

    def start(self) -> None:
        self._port = self._port or load_port(self._settings.spec)

    def introduce(self) -> Introduction:
        """Raises `PortError` when the port cannot be loaded."""
        self.start()
        assert self._port is not None
        port = self._port
        self.version = port.version
        return Introduction(port.version, tuple(port.constructors), port.arithmetic)

    def ask(self, test: Test, kind: Kind) -> Answer:
        self.start()
        assert self._port is not None
        return judge(test, self._settings.trial(self._port, kind))

    def stop(self) -> None:
        """There is nothing to end."""


class Warden:
    """A port in a process of its own: one that hangs or dies fails the clause, and is started anew."""

    def __init__(self, settings: Settings) -> None:
        self.version = UNKNOWN
        self._settings = settings
        self._child: Child | None = None
        self._introduction: Introduction | None = None
        self._introduced = False  # whether the child that is running has said who it is
        self._hangs = 0
        self._deaths = 0

    def start(self) -> None:
        """Start the port's process if it is not running; does not wait for it."""
        if self._child is None:
            self._child = Child()
            self._introduced = False

    def introduce(self) -> Introduction:
        """Wait until the port is loaded.

        Raises:
            PortError: when it does not import or is no port.
        """
        if self._introduction is not None and (self._introduced or self._introduction.lost):
            return self._introduction
        try:
            self.start()
            assert self._child is not None
            self._child.say(self._settings.to_json())
            self._child.hear(_STARTING)  # the worker is ready: from here on it is the port's time
            heard = self._child.hear(self._settings.patience + _GRACE)
        except (Silence, Gone) as loss:
            # There is no second try: every clause would wait for it again.
            lost = self._lose(loss, "while it was loaded")
            self._introduction = Introduction(UNKNOWN, KINDS, lost=lost)
            return self._introduction
        if "refused" in heard:
            self.stop()
            raise PortError(heard["refused"])
        self._introduced = True
        known = {f.name for f in fields(Introduction)}
        said = {k: v for k, v in heard.items() if k in known}
        self._introduction = Introduction(**{**said, "kinds": tuple(heard["kinds"])})
        self.version = self._introduction.version
        return self._introduction

    def ask(self, test: Test, kind: Kind) -> Answer:
        """Ask a clause of one of the port's layers, whatever the port does about it."""
        if self._hangs >= MAX_HANGS or self._deaths >= MAX_DEATHS:
            often = f"hung {self._hangs} times and died {self._deaths} times"
            return self._failed(test, f"Not asked: the port {often}, and is not started again.")
        introduction = self.introduce()
        if introduction.lost:
            return self._failed(test, introduction.lost)
        if kind not in introduction.kinds:
            return NOT_PROVIDED
        return self._answer(test, kind)

    def stop(self) -> None:
        """End the port's process."""
        if self._child is not None:
            self._child.kill()
            self._child = None

    def _answer(self, test: Test, kind: Kind) -> Answer:
        assert self._child is not None
        case, examples = None, 0
        try:
            self._child.say(f'{{"clause": "{clause_of(test).id}", "kind": "{kind}"}}')
            while True:
                heard = self._child.hear(self._settings.patience + _GRACE)
                if "answer" in heard:
                    return Answer(**heard["answer"])
                case, examples = Case.from_json(heard["case"]), examples + 1
        except (Silence, Gone) as loss:
            return self._failed(test, self._lose(loss, ""), case, examples)
        except (KeyError, TypeError, ValueError):
            return self._failed(test, self._lose(Gone(), ""), case, examples)

    def _failed(
        self, test: Test, message: str, case: Case | None = None, examples: int = 0
    ) -> Answer:
        violation = Violation(message, case=case, clause=clause_of(test))
        return Answer(
            "fail",
            str(violation),
            None if case is None else case.to_json(),
            {"examples": examples},
            violation,
        )

    def _lose(self, loss: Exception, when: str) -> str:
        """End a child that hangs or is dying, and say what became of it."""
        assert self._child is not None
        code = self._child.kill(grace=0.0 if isinstance(loss, Silence) else 2.0)
        printed = self._child.last_words()
        self._child, self._introduced = None, False
        patience = self._settings.patience
        if isinstance(loss, Silence) or f"Timeout ({_clock(patience)}" in printed:
            self._hangs += 1
            what = f"The port gave no answer for {patience:g} s"
        else:
            self._deaths += 1
            what = f"The port's process {_ending(code)}"
        return " ".join(filter(None, (what, when, _place(printed)))) + "." + _quote(printed)


def _clock(seconds: float) -> str:
    """Seconds as faulthandler prints them, without the fraction."""
    whole = int(seconds)
    return f"{whole // 3600}:{whole // 60 % 60:02}:{whole % 60:02}"


def _ending(code: int) -> str:
    if code >= 0:
        return f"ended itself with exit code {code}"
    try:
        return f"was killed by {signal.Signals(-code).name}"
    except ValueError:
        return f"was killed by signal {-code}"


def _place(printed: str) -> str:
    """Where the port was, by the last report of faulthandler's."""
    blocks = list(_BLOCK.finditer(printed))
    if not blocks:
        return ""
    current = [b for b in blocks if b["who"] == "Current thread"]
    frames = _FRAME.findall((current or blocks)[-1]["frames"])
    if not frames:
        return ""
    file, line, function = next((f for f in frames if not _LIBRARY.search(f[0])), frames[0])
    return f"in `{function}` ({short_path(file)}:{line})"


def _quote(printed: str) -> str:
    """The last lines that the port printed."""
    own = _REPORT.split(printed, maxsplit=1)[0]
    lines = [line for line in own.splitlines() if line.strip()][-_QUOTED_LINES:]
    return "".join(f"\n    | {line[:200]}" for line in lines)

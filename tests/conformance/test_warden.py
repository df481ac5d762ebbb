"""A port that hangs or dies again and again is given up, so that the run ends."""

from __future__ import annotations

from typing import Any

import pytest

from conformance import warden
from conformance.chapters import test_of as decider_of
from conformance.child import Gone, Silence
from conformance.profile import QUICK
from conformance.settings import Settings
from conformance.warden import MAX_DEATHS, MAX_HANGS, Warden

SETTINGS = Settings(spec="mine", device="cpu", profile=QUICK, patience=30)


def child_that_ends_with(loss: type[Exception]) -> tuple[type, list[object]]:
    """A stand-in for `Child` that introduces itself and no more; and the list of those started."""
    started: list[object] = []

    class Stub:
        def __init__(self) -> None:
            started.append(self)
            self.words: list[dict[str, Any]] = [
                {"ready": True},
                {"version": "1.0", "kinds": ["4bit"], "arithmetic": "input"},
            ]

        def say(self, line: str) -> None: ...

        def hear(self, seconds: float) -> dict[str, Any]:
            if not self.words:
                raise loss
            return self.words.pop(0)

        def kill(self, grace: float = 0.0) -> int:
            return -9

        def last_words(self) -> str:
            return ""

    return Stub, started


@pytest.mark.parametrize(
    ("loss", "most", "message"),
    [
        (Silence, MAX_HANGS, "The port gave no answer for 30 s."),
        (Gone, MAX_DEATHS, "The port's process was killed by SIGKILL."),
    ],
)
def test_a_port_is_not_started_for_ever(
    loss: type[Exception], most: int, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    child, started = child_that_ends_with(loss)
    monkeypatch.setattr(warden, "Child", child)
    host, test = Warden(SETTINGS), decider_of("FWD-1")

    answers = [host.ask(test, "4bit") for _ in range(most + 2)]

    assert len(started) == most
    assert {answer.status for answer in answers} == {"fail"}
    assert all(message in answer.message for answer in answers[:most])
    assert all("is not started again" in answer.message for answer in answers[most:])

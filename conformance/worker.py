"""The process in which a port is judged: it loads the port, and answers one question at a time.

Questions come in by stdin and answers leave by stdout, one JSON object a line; both are taken away from
the port before it is loaded. Whatever it prints goes to stderr, of which the warden keeps the end.
"""

from __future__ import annotations

import faulthandler
import io
import json
import os
import sys
from dataclasses import replace
from typing import IO, Any

from conformance.case import Case
from conformance.chapters import test_of, tests_by_clause
from conformance.child import READY
from conformance.judge import judge
from conformance.port import Port, PortError, load_port
from conformance.settings import Settings
from conformance.spec import clause_of
from conformance.surroundings import Tripwire
from conformance.trial import fp32_products_in_fp32
from conformance.violation import Violation


class Worker:
    """One port, and the two streams through which the warden speaks with it."""

    def __init__(self, questions: IO[str], answers: IO[str]) -> None:
        self.questions = questions
        self.answers = answers
        self.settings = Settings.from_json(questions.readline())
        self.wire = Tripwire()

    def serve(self) -> None:
        """Introduce the port, then answer until the warden hangs up."""
        # Everything that a clause needs is imported before the port is, which may tamper with imports.
        tests_by_clause()
        # For good: what the judge needs it holds already, and the port is never to get at it.
        self.wire.__enter__()
        fp32_products_in_fp32()
        self.watch()
        # What was printed until here is not the port's.
        print(READY, file=sys.stderr, flush=True)
        self.say({"ready": True})
        try:
            port = load_port(self.settings.spec)
        except PortError as error:
            self.say({"refused": str(error)})
            return
        self.say(
            {
                "version": port.version,
                "kinds": list(port.constructors),
                "arithmetic": port.arithmetic,
            }
        )
        faulthandler.cancel_dump_traceback_later()
        for line in self.questions:
            self.say({"answer": self.answer(port, json.loads(line))})
            faulthandler.cancel_dump_traceback_later()

    def answer(self, port: Port, question: dict[str, Any]) -> dict[str, Any]:
        self.watch()
        trial = self.settings.trial(port, question["kind"])
        trial.on_example = self.beat
        self.wire.reached.clear()
        test = test_of(question["clause"])
        answer = judge(test, trial)
        if answer.status == "pass" and self.wire.reached:
            reached = ", ".join(dict.fromkeys(self.wire.reached))
            violation = Violation(f"The port imported {reached}.", clause=clause_of(test))
            answer = replace(answer, status="fail", message=str(violation))
        return answer.as_json()

    def beat(self, case: Case) -> None:
        """A sign of life, and the case that is to blame if none follows."""
        self.watch()
        self.say({"case": case.to_json()})

    def watch(self) -> None:
        """From now on, too long a silence ends this process, and stderr says where it was."""
        faulthandler.dump_traceback_later(self.settings.patience, exit=True)

    def say(self, message: dict[str, Any]) -> None:
        self.answers.write(json.dumps(message) + "\n")
        self.answers.flush()


def main() -> None:
    """Serve the warden that started this process."""
    faulthandler.enable()
    questions = os.fdopen(os.dup(0), encoding="utf-8")
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.dup2(2, 1)
    # What a port printed before it died is not to die in a buffer.
    unbuffered = open(1, "wb", buffering=0, closefd=False)  # noqa: SIM115
    sys.stdout = io.TextIOWrapper(
        unbuffered, encoding="utf-8", errors="backslashreplace", write_through=True
    )
    sys.stdin = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115 - it lives as long as we do
    Worker(questions, answers).serve()
    answers.flush()
    # A port's threads and exit handlers are not waited for.
    os._exit(0)

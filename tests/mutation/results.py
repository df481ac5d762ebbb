"""What the judge said, one JSON line a mutant: a run that is cut off goes on where it stopped."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tests.mutation.mutants import FILES, PACKAGE

ROOT = Path(__file__).parents[2]
PATH = ROOT / ".mutation" / "verdicts.jsonl"


@dataclass(frozen=True)
class Verdict:
    """Who noticed the mutant, "" if nobody did; `asked` clauses reach the statement that it changes."""

    clause: str = ""
    test: str = ""
    asked: int = 0


def fingerprint(*folders: str) -> str:
    """Of all the Python sources in some folders of the repository."""
    paths = [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]
    return _digest(paths)


def sources() -> str:
    """Of what the suite's verdict depends on: the layer's files, and the suite."""
    layer = _digest([PACKAGE / file for file in FILES])
    return layer + fingerprint("reference", "conformance")


def _digest(paths: Sequence[Path]) -> str:
    digest = hashlib.sha256()
    for path in paths:
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


class Results:
    """Verdicts by the mutant's name, kept in a file."""

    def __init__(self, path: Path = PATH) -> None:
        self.path = path
        self.sources, self.tests = sources(), fingerprint("tests/qsvd")
        self.current: dict[str, Verdict] = {}
        # Let live by this suite, and asked of tests that have changed since.
        self.survivors: dict[str, Verdict] = {}
        # What other versions of the sources gave: where to look first, and no more than that.
        self.former: dict[str, Verdict] = {}
        if path.exists():
            for line in path.read_text(encoding="utf-8").splitlines():
                self._remember(json.loads(line))

    def _remember(self, entry: dict[str, Any]) -> None:
        name, judged_in, tests = entry.pop("name"), entry.pop("sources"), entry.pop("tests")
        verdict = Verdict(**entry)
        if judged_in != self.sources:
            self.former[name] = verdict
        elif verdict.clause or tests == self.tests:
            self.current[name] = verdict
        else:
            self.survivors[name] = verdict

    def add(self, name: str, verdict: Verdict) -> None:
        self.current[name] = verdict
        self.path.parent.mkdir(exist_ok=True)
        judged_in = {"sources": self.sources, "tests": self.tests}
        entry = {"name": name, **judged_in, **asdict(verdict)}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry, ensure_ascii=False) + "\n")

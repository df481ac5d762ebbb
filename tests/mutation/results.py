"""What the judge said, one JSON line a mutant, kept in docs/mutation.jsonl.

A run that is cut off goes on where it stopped, and after a change of the sources only the mutants of
functions that have changed need to be judged.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from tests.mutation.mutants import FILES, PACKAGE, Mutant

ROOT = Path(__file__).parents[2]
PATH = ROOT / "docs" / "mutation.jsonl"


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
    """Verdicts by the mutant's name, kept in a file.

    Args:
        mutants: all that there are now; a verdict holds while the function that is mutated is the same.
        path: the file.
        anew: a verdict holds only while all the sources are the same.
    """

    def __init__(self, mutants: Sequence[Mutant], path: Path = PATH, *, anew: bool = False) -> None:
        self.path, self.anew = path, anew
        self.sources, self.tests = sources(), fingerprint("tests/qsvd")
        self.current: dict[str, Verdict] = {}
        # Of those, the ones of exactly these sources.
        self.exact: set[str] = set()
        # Let live by this suite, and asked of tests that have changed since.
        self.survivors: dict[str, Verdict] = {}
        # What other versions of the sources gave: where to look first, and no more than that.
        self.former: dict[str, Verdict] = {}
        self._originals = {m.name: m.original for m in mutants}
        self._lines: dict[str, str] = {}
        if path.exists():
            for line in path.read_text(encoding="utf-8").splitlines():
                self._remember(line)

    def _remember(self, line: str) -> None:
        entry = json.loads(line)
        name, original = entry.pop("name"), entry.pop("original")
        judged_in, tests = entry.pop("sources"), entry.pop("tests")
        verdict = Verdict(**entry)
        same = judged_in == self.sources
        if original != self._originals.get(name) or (self.anew and not same):
            self.former[name] = verdict
        elif self.anew and not verdict.clause and tests != self.tests:
            self.survivors[name] = verdict
        else:
            self.current[name] = verdict
            self._lines[name] = line
            if same:
                self.exact.add(name)

    def add(self, name: str, verdict: Verdict) -> None:
        """Remember a verdict, in the file too."""
        judged = {"original": self._originals[name], "sources": self.sources, "tests": self.tests}
        line = json.dumps({"name": name, **judged, **asdict(verdict)}, ensure_ascii=False)
        self.path.parent.mkdir(exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")
        self._remember(line)

    def tidy(self) -> None:
        """Leave in the file one line for each mutant that there is, in their order."""
        lines = [self._lines[name] for name in self._originals if name in self._lines]
        self.path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")

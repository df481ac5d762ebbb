"""What the judge said, one JSON line a mutant: a run that is cut off goes on where it stopped."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PATH = ROOT / ".mutation" / "verdicts.jsonl"
_JUDGED_BY = ("qsvd", "reference", "conformance", "tests/qsvd")


@dataclass(frozen=True)
class Verdict:
    """Who noticed the mutant, "" if nobody did; `asked` clauses reach the statement that it changes."""

    clause: str = ""
    test: str = ""
    asked: int = 0


def fingerprint() -> str:
    """Of all the sources that a verdict depends on."""
    digest = hashlib.sha256()
    for folder in _JUDGED_BY:
        for path in sorted((ROOT / folder).rglob("*.py")):
            digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


class Results:
    """Verdicts by the mutant's name, kept in a file."""

    def __init__(self, path: Path = PATH) -> None:
        self.path = path
        self.sources = fingerprint()
        self.current: dict[str, Verdict] = {}
        # What other versions of the sources gave: where to look first, and no more than that.
        self.former: dict[str, Verdict] = {}
        if path.exists():
            for line in path.read_text(encoding="utf-8").splitlines():
                entry = json.loads(line)
                name, sources = entry.pop("name"), entry.pop("sources")
                known = self.current if sources == self.sources else self.former
                known[name] = Verdict(**entry)

    def add(self, name: str, verdict: Verdict) -> None:
        self.current[name] = verdict
        self.path.parent.mkdir(exist_ok=True)
        entry = {"name": name, "sources": self.sources, **asdict(verdict)}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry, ensure_ascii=False) + "\n")

"""Records: what one run found of one port, as docs/verdicts keeps it, and the causes of its failures."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from conformance.port import DEFAULT_PORT
from conformance.spec import KINDS, clauses

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


class RecordError(Exception):
    """Records and explanations that are not in step: the message names the entry and the remedy."""


@dataclass(frozen=True)
class Finding:
    """One clause asked of one layer; `message` and `reproduce` are empty unless it failed."""

    clause: str
    layer: str
    status: str
    worst_ratio: float | None = 0.0
    message: str = ""
    reproduce: str = ""

    @property
    def failed(self) -> bool:
        return self.status == "fail"


@dataclass(frozen=True)
class Record:
    """One run of the suite on one port."""

    port: str
    version: str
    suite: Mapping[str, Any]
    findings: tuple[Finding, ...]

    @property
    def family(self) -> str:
        """`peft` of `conformance.ports.peft`, `mine` of `ports/mine.py`."""
        return self.port.rpartition("/")[2].removesuffix(".py").rpartition(".")[2]

    @property
    def name(self) -> str:
        """The name of its file, and the title of its column."""
        return f"{self.family}-{self.version}"

    @property
    def release(self) -> tuple[int, ...]:
        """The version as numbers, to be compared."""
        return release_of(self.version)

    @property
    def environment(self) -> str:
        """The tox environment in which its failures can be seen again."""
        return self.name if self.family == "peft" else "verdicts"

    @property
    def failures(self) -> tuple[Finding, ...]:
        return tuple(f for f in self.findings if f.failed)

    def of(self, clause: str) -> tuple[Finding, ...]:
        """What was found of one clause, layer by layer."""
        return tuple(f for f in self.findings if f.clause == clause)

    def to_json(self) -> str:
        """One finding a line, so that a new run is a diff that can be read."""
        head = {"port": self.port, "version": self.version, "suite": self.suite}
        lines = ",\n".join(
            json.dumps({k: v for k, v in vars(f).items() if v != ""}) for f in self.findings
        )
        return f'{json.dumps(head, indent=1)[:-2]},\n "findings": [\n{lines}\n ]\n}}\n'

    @classmethod
    def from_json(cls, text: str) -> Record:
        content = json.loads(text)
        findings = tuple(Finding(**f) for f in content.pop("findings"))
        return cls(findings=findings, **content)


@dataclass(frozen=True)
class Explanation:
    """Why some clauses fail in some releases of a port.

    `clauses` lists ids, or is `*` for whatever fails with a message that `message` matches.
    """

    port: str
    clauses: tuple[str, ...]
    cause: str
    link: str = ""
    since: str = "0"
    until: str = "9999"
    layer: str | None = None
    message: str = ""

    def concerns(self, record: Record) -> bool:
        return record.family == self.port and release_of(
            self.since
        ) <= record.release <= release_of(self.until)

    def covers(self, record: Record, finding: Finding) -> bool:
        return (
            self.concerns(record)
            and (self.clauses == ("*",) or finding.clause in self.clauses)
            and self.layer in (None, finding.layer)
            and re.search(self.message, finding.message) is not None
        )


def release_of(version: str) -> tuple[int, ...]:
    """0.21.2 as (0, 21, 2)."""
    return tuple(int(number) for number in re.findall(r"\d+", version))


def load_records(folder: Path) -> tuple[Record, ...]:
    """All records of a folder: the default port first, then by family and release."""
    found = [Record.from_json(p.read_text(encoding="utf-8")) for p in folder.glob("*.json")]
    return tuple(sorted(found, key=lambda r: (r.port != DEFAULT_PORT, r.family, r.release)))


def load_explanations(path: Path) -> tuple[Explanation, ...]:
    """Read explanations.toml.

    Raises:
        RecordError: when an entry lacks a key, has an unknown one, or names no clause or layer.
    """
    entries = []
    known = set(Explanation.__dataclass_fields__)
    for number, raw in enumerate(tomllib.loads(path.read_text(encoding="utf-8"))["explanation"], 1):
        where = f"{path.name}: entry {number}"
        if (missing := {"port", "clauses", "cause"} - set(raw)) or (unknown := set(raw) - known):
            raise RecordError(f"{where}: missing {sorted(missing)}, unknown {sorted(unknown)}.")
        entry = Explanation(**{**raw, "clauses": tuple(raw["clauses"])})
        if strange := set(entry.clauses) - set(clauses()) - {"*"}:
            raise RecordError(f"{where}: SPEC.md has no clause {sorted(strange)}.")
        if entry.layer not in (None, *KINDS):
            raise RecordError(f"{where}: `layer` is {entry.layer!r}; it must be one of {KINDS}.")
        entries.append(entry)
    return tuple(entries)


def explain(
    records: Iterable[Record], explanations: Sequence[Explanation]
) -> dict[tuple[str, str, str], int]:
    """The number of the explanation of each failure, by (record, clause, layer): the first that covers it.

    Raises:
        RecordError: when a failure has no explanation, or an explanation is about what does not fail.
    """
    found: dict[tuple[str, str, str], int] = {}
    used: set[tuple[int, str, str]] = set()
    wrong = []
    records = tuple(records)
    for record in records:
        for f in record.failures:
            number = next((i for i, e in enumerate(explanations) if e.covers(record, f)), None)
            if number is None:
                message = f.message.partition("\n")[0]
                wrong.append(f"{record.name} {f.clause} {f.layer} is not explained: {message}")
                continue
            found[record.name, f.clause, f.layer] = number
            used |= {(number, record.name, f.clause), (number, record.name, "*")}
    for number, entry in enumerate(explanations):
        concerned = [r for r in records if entry.concerns(r)]
        if not concerned:
            wrong.append(f"entry {number + 1} ({entry.port}) is about no port that was judged.")
        wrong += [
            f"{record.name} {clause} does not fail as entry {number + 1} says: {entry.cause}"
            for record in concerned
            for clause in entry.clauses
            if (number, record.name, clause) not in used
        ]
    if wrong:
        raise RecordError("\n".join(wrong))
    return found

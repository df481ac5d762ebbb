"""The specification as data: `SPEC.md`, read once, without pytest or PyTorch."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

Level = Literal["MUST", "SHOULD"]

SPEC_PATH = Path(__file__).with_name("SPEC.md")
_VERSION = re.compile(r"^Specification version (\d+\.\d+)\.", re.MULTILINE)
_CHAPTER = re.compile(r"^## (.+)$")
_ROW = re.compile(r"^\| ([A-Z]+-\d+) \| (MUST|SHOULD) \| (.+?) \| (.+?) \|$")


@dataclass(frozen=True)
class Clause:
    """One sentence of SPEC.md that a test decides."""

    id: str
    level: Level
    sentence: str
    source: str
    chapter: str


@cache
def clauses() -> Mapping[str, Clause]:
    """All clauses of SPEC.md by id, in the document's order."""
    found: dict[str, Clause] = {}
    chapter = ""
    for line in SPEC_PATH.read_text(encoding="utf-8").splitlines():
        if heading := _CHAPTER.match(line):
            chapter = heading[1]
        elif row := _ROW.match(line):
            identifier, level, sentence, source = row.groups()
            if identifier in found:
                raise ValueError(f"SPEC.md defines clause {identifier} twice.")
            found[identifier] = Clause(
                identifier, "MUST" if level == "MUST" else "SHOULD", sentence, source, chapter
            )
    return found


@cache
def spec_version() -> str:
    """The version that SPEC.md declares in its head."""
    match = _VERSION.search(SPEC_PATH.read_text(encoding="utf-8"))
    if match is None:
        raise ValueError("SPEC.md does not say `Specification version 1.0.` in its head.")
    return match[1]

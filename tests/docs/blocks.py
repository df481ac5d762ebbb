"""The fenced code blocks of our Markdown pages, and which pages those are."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from markdown_it import MarkdownIt

ROOT = Path(__file__).resolve().parents[2]
# Reports with a test of their own, `test_upstream.py`.
_OTHERS = ROOT / "docs" / "upstream"
# A block that cannot run says so where its reader sees it, in its first line.
NOT_RUN = re.compile(r"^# not run by the tests: (?P<why>.+)")


@dataclass(frozen=True)
class Block:
    """A fenced block: the page that has it, the line where its text starts, its language.

    shown: it stands right after the block before, with nothing but a blank line between.
    """

    page: str
    line: int
    language: str
    text: str
    shown: bool = False

    @property
    def not_run(self) -> str | None:
        """Why the block is only to be read, if it says that it is."""
        said = NOT_RUN.match(self.text)
        return said["why"] if said else None

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def pages() -> list[str]:
    """README.md and all Markdown of docs/ and examples/, but for the reports with their own test."""
    found = [ROOT / "README.md", *ROOT.glob("docs/**/*.md"), *ROOT.glob("examples/**/*.md")]
    return sorted(p.relative_to(ROOT).as_posix() for p in found if _OTHERS not in p.parents)


def blocks(page: str) -> list[Block]:
    """The fenced blocks of a page, in its order, those in lists too."""
    return blocks_of((ROOT / page).read_text(encoding="utf-8"), page)


def blocks_of(text: str, page: str) -> list[Block]:
    """The fenced blocks of a page's text."""
    found: list[Block] = []
    after = -1  # the line after the last block's end
    for token in MarkdownIt().parse(text):
        if token.type == "fence" and token.map:
            start, end = token.map
            shown = start == after + 1
            found.append(Block(page, start + 2, token.info.strip(), token.content, shown))
            after = end
    return found

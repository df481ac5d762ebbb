"""A page's code blocks run in their order, as a reader would type them."""

from __future__ import annotations

import contextlib
import io
import linecache
import os
import re
import subprocess
import sys
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from conformance.vectors.__main__ import main as vectors
from tests.conformance.command import run_suite
from tests.docs.blocks import ROOT, Block
from tests.docs.commands import PLACEHOLDERS, check, commands
from tests.docs.prelude import Prelude

PORT_OF_VECTORS = ROOT / "examples" / "numpy_port" / "port.py"
_NAMED = re.compile(r"^# (?P<path>[\w./-]+\.(py|md|toml))$")
_RULES = re.compile("[\u2500-\u257f]")
_RATIO = re.compile(r"pass \d\.\d\d")
_LANGUAGES = {"python", "console", "text", "toml", "diff"}


class PageError(Exception):
    """A page that says what is not so."""


class Page:
    """One page on its way from its first block to its last.

    - Python runs in one namespace, in `folder`; see `Prelude` for the names that it may take for granted.
    - A block that begins with `# path` of a file in the repository is an excerpt of that file, to the
      letter; one that begins with `# name.py` otherwise is written to that file.
    - Console commands are checked, and run where that takes seconds: single clauses, and vectors.
    - Text right after a console block is lines that its last command prints, in their order, `...`
      standing for anything in a line.
    - A diff is to be read.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.prelude = Prelude(folder)
        self.namespace: dict[str, Any] = {"__name__": "__main__"}
        self.printed: str | None = None  # by the console block just before, if it ran

    def run_all(self, page: Sequence[Block]) -> None:
        """Run the blocks of a page, from the first to the last."""
        for block in page:
            self.run(block)

    def run(self, block: Block) -> None:
        """Run one block.

        Raises:
            PageError: for a block that is not as it says.
            Exception: what the block's own code raises.
        """
        printed, self.printed = self.printed, None
        if block.language not in _LANGUAGES:
            raise PageError(f"{block}: a block is one of {sorted(_LANGUAGES)}")
        if block.not_run:
            return
        if named := _NAMED.match(block.text.partition("\n")[0]):
            self._file(block, named["path"])
        elif block.language == "python":
            self._python(block)
        elif block.language == "console":
            self._console(block)
        elif block.shown and printed is not None:
            self._output(block, printed)

    def _file(self, block: Block, path: str) -> None:
        if not (ROOT / path).is_file():
            (self.folder / path).write_text(block.text, encoding="utf-8")
            return
        excerpt = block.text.partition("\n")[2].strip("\n")
        if excerpt not in (ROOT / path).read_text(encoding="utf-8"):
            raise PageError(f"{block}: {path} has no such lines")

    def _python(self, block: Block) -> None:
        source = "\n" * (block.line - 1) + block.text  # so that tracebacks name the page's lines
        code = compile(source, block.page, "exec")
        linecache.cache[block.page] = (len(source), None, source.splitlines(True), block.page)
        self.namespace.update(self.prelude.names_for(block.text))
        with _in_folder(self.folder), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what libraries deprecate of themselves
            exec(code, self.namespace)

    def _console(self, block: Block) -> None:
        for command in commands(block):
            check(command)
            self.printed = self._execute(command)

    def _execute(self, command: Sequence[str]) -> str | None:
        """What a command prints, or None if it takes too long to be run here."""
        if command[0] == "pytest" and any(word.startswith("--clause=") for word in command):
            return run_suite(*command[2:], "--in-process", cwd=self.folder).stdout
        if command[:3] == ["python", "-m", "conformance.vectors"]:
            with _in_folder(self.folder), contextlib.redirect_stdout(io.StringIO()) as output:
                if vectors(command[3:]) != 0:
                    raise PageError(f"{' '.join(command)} fails: {output.getvalue()}")
            return output.getvalue()
        if command[0] in PLACEHOLDERS or command[1:2] == ["examples/numpy_port/port.py"]:
            arguments = command[1:] if command[0] in PLACEHOLDERS else command[2:]
            done = subprocess.run(
                [sys.executable, str(PORT_OF_VECTORS), *arguments],
                cwd=self.folder,
                capture_output=True,
                text=True,
                check=True,
            )
            return done.stdout
        return None

    def _output(self, block: Block, printed: str) -> None:
        """Refuse a line that was not printed, or not after the one before."""
        rest = _plain(printed)
        for line in block.text.splitlines():
            pattern = r".*?".join(re.escape(piece.strip()) for piece in _plain(line).split("..."))
            found = re.search(pattern.replace(r".*?", r"[^\n]*?"), rest)
            if found is None:
                raise PageError(f"{block}: was not printed: {line.strip()!r}\n\n{printed}")
            rest = rest[found.end() :]


def _plain(text: str) -> str:
    """Text without a table's rules, without runs of spaces, and without error / bound.

    These ratios depend on the order in which a machine sums.
    """
    lines = (" ".join(_RULES.sub(" ", line).split()) for line in text.splitlines())
    return "\n".join(_RATIO.sub("pass", line) for line in lines)


@contextlib.contextmanager
def _in_folder(folder: Path) -> Iterator[None]:
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)

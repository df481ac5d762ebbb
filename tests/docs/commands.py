"""The commands of console blocks: each must be one that its program understands."""

from __future__ import annotations

import argparse
import configparser
import itertools
import re
import shlex
import sys
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from packaging.requirements import InvalidRequirement, Requirement

from conformance.benchmarks.conftest import pytest_addoption as benchmarks_addoption
from conformance.case import Case
from conformance.conftest import pytest_addoption
from conformance.spec import clauses
from conformance.vectors.__main__ import _parser as vectors_parser
from tests.docs.blocks import ROOT, Block

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

# What stands in a page for the reader's own.
PLACEHOLDERS = {"your-port"}


class CommandError(Exception):
    """A command that would not run as it is printed."""


def commands(block: Block) -> list[list[str]]:
    """The commands of a console block, comments gone, `&&` and continued lines taken apart."""
    text = block.text.replace("\\\n", " ")
    found = []
    for line in text.splitlines():
        words = shlex.split(line, comments=True)
        for joined, command in itertools.groupby(words, key=lambda word: word == "&&"):
            if not joined:
                found.append(list(command))
    return found


def check(command: Sequence[str]) -> None:
    """Refuse a command that its program would not understand.

    Raises:
        CommandError: naming what is wrong with it.
    """
    for start, checker in _CHECKERS.items():
        if tuple(command[: len(start)]) == start:
            checker(list(command[len(start) :]))
            return
    if command[0] not in PLACEHOLDERS:
        raise CommandError(f"nothing here knows what `{shlex.join(command)}` does")


def check_tox(arguments: list[str]) -> None:
    """`tox [run] (-e ENVIRONMENTS | -m LABEL) [-- COMMAND]`, of environments in tox.ini."""
    given = arguments[arguments[:1] == ["run"] :]
    own, _, inner = _partition(given, "--")
    parser = _Parser()
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("-e")
    which.add_argument("-m")
    options = parser.parse_args(own)
    known = labels() if options.m else environments()
    for name in (options.m or options.e).split(","):
        if name not in known:
            raise CommandError(f"tox.ini has no {name!r}")
    if inner and inner[0] in ("pytest", "python"):
        check(inner)


@cache
def environments() -> set[str]:
    """The names of tox.ini's environments, the braces of their families spelled out."""
    sections = (name.removeprefix("testenv:") for name in _tox_ini() if name.startswith("testenv:"))
    return {name for section in sections for name in _spelled_out(section)}


@cache
def labels() -> set[str]:
    """The labels of tox.ini."""
    lines = _tox_ini()["tox"]["labels"].split("\n")
    return {line.partition("=")[0].strip() for line in lines if line.strip()}


def check_pytest(arguments: list[str]) -> None:
    """`pytest PATHS OPTIONS`, with the suite's options and the few of pytest's that we print."""
    parser = _Parser()
    parser.add_argument("paths", nargs="+")
    parser.add_argument("-n", type=int)
    parser.add_argument("-k")
    parser.add_argument("--pdb", action="store_true")
    parser.add_argument("--junitxml")
    pytest_addoption(parser)  # type: ignore[arg-type]
    benchmarks_addoption(parser)  # type: ignore[arg-type]
    options = parser.parse_intermixed_args(arguments)
    for path in options.paths:
        if not (ROOT / path).exists():
            raise CommandError(f"there is no {path}")
    for clause in options.clause or ():
        if clause not in clauses():
            raise CommandError(f"SPEC.md has no clause {clause}")
    if options.case:
        try:
            Case.from_json(options.case)
        except (TypeError, ValueError) as error:
            raise CommandError(f"--case: {error}") from error


def check_pip(arguments: list[str]) -> None:
    """`python -m pip install REQUIREMENTS`, a checkout among them as `.[extras]`."""
    for argument in arguments:
        try:
            wanted = Requirement(f"qsvd{argument[1:]}" if argument.startswith(".") else argument)
        except InvalidRequirement as error:
            raise CommandError(str(error)) from error
        if argument.startswith(".") and not wanted.extras <= extras():
            raise CommandError(f"pyproject.toml lacks one of the extras {sorted(wanted.extras)}")


@cache
def extras() -> set[str]:
    """The optional parts that pyproject.toml offers."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    return set(tomllib.loads(text)["project"]["optional-dependencies"])


def check_script(arguments: list[str]) -> None:
    """`python SCRIPT ...`, of a file that is here."""
    if not (ROOT / arguments[0]).is_file():
        raise CommandError(f"there is no {arguments[0]}")


def check_torchrun(arguments: list[str]) -> None:
    """`torchrun OPTIONS SCRIPT ...`, with torchrun's own options, of a file that is here."""
    from torch.distributed.run import get_args_parser

    try:
        options = get_args_parser().parse_args(arguments)
    except SystemExit as error:
        raise CommandError(f"torchrun does not understand {arguments}") from error
    check_script([options.training_script])


def check_vectors(arguments: list[str]) -> None:
    """`python -m conformance.vectors write|check ...`."""
    try:
        vectors_parser().parse_args(arguments)
    except SystemExit as error:
        raise CommandError(f"conformance.vectors does not understand {arguments}") from error


# The longest start that fits comes first.
_CHECKERS: dict[tuple[str, ...], Callable[[list[str]], None]] = {
    ("tox",): check_tox,
    ("python", "-m", "tox"): check_tox,
    ("pytest",): check_pytest,
    ("python", "-m", "pytest"): check_pytest,
    ("python", "-m", "pip", "install"): check_pip,
    ("pip", "install"): check_pip,
    ("python", "-m", "conformance.vectors"): check_vectors,
    ("torchrun",): check_torchrun,
    ("python",): check_script,
}


class _Parser(argparse.ArgumentParser):
    """argparse with pytest's names for what it does, and our error."""

    def getgroup(self, *_: str) -> _Parser:
        return self

    def addoption(self, *args: Any, **kwargs: Any) -> None:
        self.add_argument(*args, **kwargs)

    def error(self, message: str) -> Any:
        raise CommandError(message)


def _partition(words: list[str], at: str) -> tuple[list[str], bool, list[str]]:
    if at not in words:
        return words, False, []
    i = words.index(at)
    return words[:i], True, words[i + 1 :]


@cache
def _tox_ini() -> configparser.ConfigParser:
    parser = configparser.ConfigParser(interpolation=None)
    parser.read_string(Path(ROOT / "tox.ini").read_text(encoding="utf-8"))
    return parser


def _spelled_out(name: str) -> list[str]:
    braces = re.search(r"\{([^}]*)\}", name)
    if braces is None:
        return [name]
    before, after = name[: braces.start()], name[braces.end() :]
    return [f"{before}{choice.strip()}{after}" for choice in braces[1].split(",")]

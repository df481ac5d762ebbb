"""Every code block of README.md, of docs/ and of examples/ runs, or is a command that would."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest
import torch

from tests.docs.blocks import Block, blocks, blocks_of, pages
from tests.docs.commands import CommandError, check, commands
from tests.docs.running import Page, PageError

# One reproducer for each failure of each release of PEFT, each in an environment of its own.
REPRODUCERS = [page for page in pages() if page.startswith("docs/verdicts/")]
RUN = [page for page in pages() if page not in REPRODUCERS and blocks(page)]


@pytest.mark.parametrize("page", RUN)
def test_the_blocks_of_a_page_run(page: str, tmp_path: Path) -> None:
    with torch.random.fork_rng():
        Page(tmp_path).run_all(blocks(page))


@pytest.mark.parametrize("page", REPRODUCERS)
def test_the_commands_of_a_verdict_are_understood(page: str) -> None:
    for block in blocks(page):
        if block.language == "console":
            for command in commands(block):
                check(command)


@pytest.mark.parametrize(
    "command",
    [
        "tox -e no-such-environment",
        "tox run -m no-such-label",
        "pytest no-such-folder",
        "pytest conformance --profil=quick --profile=slow",
        "pytest conformance --clause=FWD-999",
        "pytest conformance '--case={}'",
        "pytest conformance --no-such-option",
        "python no_such_script.py",
        "torchrun --nproc-per-node 2 no_such_script.py",
        "torchrun --no-such-option examples/distributed.py",
        "python -m pip install '.[no-such-extra]'",
        "python -m conformance.vectors wrote vectors",
        "make",
    ],
)
def test_a_wrong_command_is_refused(command: str) -> None:
    with pytest.raises(CommandError):
        check(commands(Block("page", 1, "console", command))[0])


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("```python\nassert 1 == 2\n```", AssertionError),
        ("```python\nno_such_name\n```", NameError),
        ("```python\n# qsvd/_layer.py\nclass NoSuchLayer:\n```", PageError),
        ("- in a list\n\n  ```python\n  1 / 0\n  ```", ZeroDivisionError),
        ("```\nno language\n```", PageError),
    ],
)
def test_a_wrong_block_fails(text: str, error: type[Exception], tmp_path: Path) -> None:
    with pytest.raises(error):
        Page(tmp_path).run_all(blocks_of(text, "page"))


def test_output_that_was_not_printed_fails(tmp_path: Path) -> None:
    page = "```console\npytest conformance\n```\n\n```text\n3 pass\n2 ... fail\n```"
    command, output = blocks_of(page, "page")
    for printed, right in (("│ 3   pass\n4 skip\n2 or 1 fail", True), ("3 pass\n2\n1 fail", False)):
        reader = Page(tmp_path)
        reader.run(command)
        reader.printed = printed
        with (
            contextlib.nullcontext()
            if right
            else pytest.raises(PageError, match=r"'2 \.\.\. fail'")
        ):
            reader.run(output)


def test_a_block_that_must_not_run_says_why(tmp_path: Path) -> None:
    (block,) = blocks_of("```python\n# not run by the tests: needs two GPUs\n1 / 0\n```", "page")
    Page(tmp_path).run(block)
    assert block.not_run == "needs two GPUs"

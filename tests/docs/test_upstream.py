"""The reports of docs/upstream show what they say: each script prints exactly what the report says it does.

Run as a program, this file is its own runner: one process for all scripts, which prints JSON.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import io
import json
import re
import subprocess
import sys
import traceback
import warnings
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "docs" / "upstream"
REPORTS = sorted(path.stem for path in FOLDER.glob("*.md") if path.stem != "README")
PINNED = {"torch": "2.13.0", "bitsandbytes": "0.50.2", "peft": "0.21.2"}
SECTIONS = ["Script", "Observed", "Expected", "Cause", "Suggested fix", "Known", "Versions"]


def text_of(name: str) -> str:
    return (FOLDER / f"{name}.md").read_text(encoding="utf-8")


def block(name: str, section: str) -> str:
    """The fenced block of a section."""
    found = re.search(rf"^## {section}\n\n```\w+\n(.*?)^```$", text_of(name), re.M | re.S)
    assert found, f"{name}.md has no block in its section {section}"
    return found[1]


def execute(name: str) -> str:
    """What a report's script prints; a script that raises prints its traceback."""
    output = io.StringIO()
    with contextlib.redirect_stdout(output), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            exec(compile(block(name, "Script"), f"{name}.md", "exec"), {"__name__": "__main__"})
        except Exception:
            traceback.print_exc(file=output)
    return output.getvalue()


if __name__ == "__main__":
    print(json.dumps({name: execute(name) for name in REPORTS}))
    sys.exit(0)


import pytest  # noqa: E402  the runner above needs no test framework


@pytest.fixture(scope="module")
def outputs() -> dict[str, str]:
    """What every script printed, from one process."""
    here = {}
    for package in PINNED:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            here[package] = importlib.metadata.version(package).partition("+")[0]
    if here != PINNED:
        pytest.skip(f"the reports are about {PINNED}, here is {here}")
    command = [sys.executable, __file__]
    run = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert run.returncode == 0, run.stderr
    result: dict[str, str] = json.loads(run.stdout.splitlines()[-1])
    return result


def can_be_seen_here(name: str) -> bool:
    """Whether this CPU has the instructions that a report says it needs."""
    from bitsandbytes.functional import has_avx512bf16

    return "Needs a CPU with AVX512" not in text_of(name) or bool(has_avx512bf16())


@pytest.mark.parametrize("name", REPORTS)
def test_the_script_prints_what_the_report_says(outputs: dict[str, str], name: str) -> None:
    """
    The output is the report's, to the letter.
    """
    if not can_be_seen_here(name):
        pytest.skip("this CPU cannot show it")

    assert [line.rstrip() for line in outputs[name].splitlines()] == block(
        name, "Observed"
    ).splitlines()


@pytest.mark.parametrize("name", REPORTS)
def test_the_report_is_complete(name: str) -> None:
    """
    A report has every section, a script under 30 lines that stands alone, and expects something else.
    """
    script = block(name, "Script")

    assert re.findall(r"^## (.+)$", text_of(name), re.M) == SECTIONS
    assert len(script.splitlines()) < 30
    assert not re.search(r"^\s*(from|import) (qsvd|reference|conformance|tests)\b", script, re.M)
    assert block(name, "Observed") != block(name, "Expected")
    assert "Status: not sent." in text_of(name)


@pytest.mark.parametrize("name", REPORTS)
def test_the_report_refers_to_scripts_that_exist(name: str) -> None:
    """
    Each report names at least one script of docs/defects.
    """
    scripts = re.findall(r"\]\(\.\./defects/(\w+\.py)\)", text_of(name))

    assert scripts
    assert all((FOLDER.parent / "defects" / script).is_file() for script in scripts)


def test_the_index_lists_every_report_once() -> None:
    """
    README.md has one row for each report.
    """
    rows = re.findall(r"^\| \[.*\]\((\w+)\.md\) \|", text_of("README"), re.M)

    assert sorted(rows) == REPORTS


def test_every_defect_is_reported_or_said_not_to_be() -> None:
    """
    Each script of docs/defects is named by a report or, with a reason, by README.md.
    """
    pages = [text_of(name) for name in [*REPORTS, "README"]]
    named = {script for page in pages for script in re.findall(r"\.\./defects/(\w+)\.py", page)}

    assert named == {path.stem for path in (FOLDER.parent / "defects").glob("*.py")}


@pytest.mark.parametrize("name", REPORTS)
def test_the_index_says_what_the_report_says(name: str) -> None:
    """
    A row of README.md has its report's title and severity, and is new where the report knows of no thread.
    """
    pattern = rf"^\| \[(.*)\]\({name}\.md\) \| (\w+) \| ([^|]+) \|"
    [(title, severity, known)] = re.findall(pattern, text_of("README"), re.M)

    assert text_of(name).startswith(f"# {title}\n")
    assert f"Severity: {severity}. " in text_of(name)
    assert (known == "new") == ("\nNo thread about it was found.\n" in text_of(name))

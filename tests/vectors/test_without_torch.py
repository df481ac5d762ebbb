"""Vectors are written and checked where there is neither PyTorch nor pytest, nor this project's layers."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.vectors.conftest import ROOT

BEHIND_THE_WALL = ("torch", "bitsandbytes", "qsvd", "peft", "transformers", "pytest", "hypothesis")
WALL = f"""
import sys

class Wall:
    def find_spec(self, name, path=None, target=None):
        if name.partition('.')[0] in {BEHIND_THE_WALL!r}:
            raise ImportError('behind the wall: ' + name)

sys.meta_path.insert(0, Wall())
"""
WRITE = """
from conformance.vectors import catalogue, making, quantising, writing
kinds = {recipe.kind: recipe for recipe in catalogue.layers()}
made = [making.make_layer(recipe, 0) for recipe in kinds.values()]
made += [quantising.make_quantiser(recipe, 0) for recipe in catalogue.quantisers()]
assert len(writing.contents_of(made, 0)) == 3 and len(kinds) == 8
"""
CHECK = """
from conformance.vectors.__main__ import main
sys.exit(main(['check', *sys.argv[1:]]))
"""


def run(source: str, *arguments: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", WALL + source, *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def test_the_wall_stands() -> None:
    assert "behind the wall: torch" in run("import torch").stderr


def test_vectors_are_written_behind_the_wall() -> None:
    done = run(WRITE)
    assert done.returncode == 0, done.stderr


def test_vectors_are_checked_behind_the_wall(small: Path, small_honest: Path) -> None:
    done = run(CHECK, small, small_honest)
    assert done.returncode == 0, done.stderr
    assert "The outputs conform" in done.stdout


def test_a_terminal_that_lacks_the_characters_is_no_obstacle(
    small: Path, small_honest: Path
) -> None:
    """Tables have lines and ∞; a terminal in ASCII gets something in their place, not a traceback."""
    command = [sys.executable, "-m", "conformance.vectors", "check", str(small), str(small_honest)]
    done = subprocess.run(
        command,
        cwd=ROOT,
        capture_output=True,
        env={"PYTHONIOENCODING": "ascii", "PATH": "", "PYTHONUTF8": "0"},
        check=False,
    )
    assert done.returncode == 0, done.stderr

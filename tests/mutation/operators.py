"""Mutation operators: the choice from cosmic-ray's, and three of our own that a tensor library needs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import parso
from cosmic_ray.operators.exception_replacer import ExceptionReplacer
from cosmic_ray.operators.operator import Example, Operator
from cosmic_ray.operators.provider import OperatorProvider

Position = tuple[tuple[int, int], tuple[int, int]]

# One or two replacements for each operator: cosmic-ray has all pairs, and `+` to `>>` says no more
# than `+` to `-` does. Variables replaced by random numbers are left out: they are not repeatable.
_REPLACED = {
    "BinaryOperator": {
        "Add": ["Sub"],
        "Sub": ["Add"],
        "Mul": ["Div"],
        "Div": ["Mul"],
        "FloorDiv": ["Div"],
        "Mod": ["FloorDiv"],
        "Pow": ["Mul"],
        "LShift": ["RShift"],
        "RShift": ["LShift"],
        "BitOr": ["BitAnd"],
        "BitAnd": ["BitOr"],
    },
    "ComparisonOperator": {
        "Eq": ["NotEq"],
        "NotEq": ["Eq"],
        "Lt": ["LtE", "GtE"],
        "LtE": ["Lt", "Gt"],
        "Gt": ["GtE", "LtE"],
        "GtE": ["Gt", "Lt"],
        "Is": ["IsNot"],
        "IsNot": ["Is"],
    },
    "UnaryOperator": {"USub": ["UAdd"], "UAdd": ["USub"], "Delete": ["Not", "Invert"]},
}
_PLAIN = (
    "AddNot",
    "ReplaceTrueWithFalse",
    "ReplaceFalseWithTrue",
    "ReplaceAndWithOr",
    "ReplaceOrWithAnd",
    "ReplaceBreakWithContinue",
    "ReplaceContinueWithBreak",
    "NumberReplacer",
    "RemoveDecorator",
    "ZeroIterationForLoop",
)
_DTYPES = {"float32": "float16", "float16": "bfloat16", "bfloat16": "float16", "float64": "float32"}


class RemoveStatement(Operator):  # type: ignore[misc]
    """Leave out a call, a `raise`, a `del`, or an assignment to an attribute or an item."""

    def mutation_positions(self, node: Any) -> Iterator[Position]:
        if node.type == "simple_stmt" and _has_effect(node.children[0]):
            yield node.start_pos, node.end_pos

    def mutate(self, node: Any, index: int) -> Any:
        removed = node.children[0]
        nothing = parso.parse("pass").children[0]
        nothing.prefix = removed.get_first_leaf().prefix
        node.children[0] = nothing
        return node

    @classmethod
    def examples(cls) -> tuple[Example, ...]:
        return (Example("f(x)\n", "pass\n"), Example("a.b = 1\n", "pass\n"))


class RemoveKeywordArgument(Operator):  # type: ignore[misc]
    """Leave a keyword argument to its default."""

    def mutation_positions(self, node: Any) -> Iterator[Position]:
        for _, argument in _keywords(node):
            yield argument.start_pos, argument.end_pos

    def mutate(self, node: Any, index: int) -> Any:
        at, _ = list(_keywords(node))[index]
        following = node.children[at + 1] if at + 1 < len(node.children) else None
        preceding = node.children[at - 1]
        children = list(node.children)
        del children[at]
        if getattr(following, "value", None) == ",":
            del children[at]
        elif getattr(preceding, "value", None) == ",":
            del children[at - 1]
        node.children = children
        return node

    @classmethod
    def examples(cls) -> tuple[Example, ...]:
        return (Example("f(x, k=1)", "f(x)"), Example("f(k=1)", "f()"))


class ReplaceDtype(Operator):  # type: ignore[misc]
    """Another floating dtype: `torch.float32` becomes `torch.float16`."""

    def mutation_positions(self, node: Any) -> Iterator[Position]:
        if node.type == "name" and node.value in _DTYPES and node.get_previous_leaf() == ".":
            yield node.start_pos, node.end_pos

    def mutate(self, node: Any, index: int) -> Any:
        node.value = _DTYPES[node.value]
        return node

    @classmethod
    def examples(cls) -> tuple[Example, ...]:
        return (Example("t.to(torch.float32)", "t.to(torch.float16)"),)


class ReplaceException(ExceptionReplacer):  # type: ignore[misc]
    """cosmic-ray's, for plain names: 8.7 fails on `json.JSONDecodeError`."""

    @staticmethod
    def _name_nodes(node: Any) -> list[Any]:
        caught = node.children[1]
        if caught.type == "atom":
            caught = caught.children[1]
        names = caught.children[::2] if caught.type == "testlist_comp" else [caught]
        return [name for name in names if name.type == "name"]

    @classmethod
    def examples(cls) -> tuple[Example, ...]:
        before, after = "try: f()\nexcept (a.B, C): pass", "try: f()\nexcept (a.B, {}): pass"
        return (Example(before, after.format("CosmicRayTestingException")),)


def operators() -> dict[str, Operator]:
    """All operators in use, by name."""
    provider = OperatorProvider()
    pairs = (
        f"Replace{kind}_{one}_{other}"
        for kind, table in _REPLACED.items()
        for one, others in table.items()
        for other in others
    )
    found = {name: provider[name]() for name in (*pairs, *_PLAIN)}
    own = (RemoveStatement, RemoveKeywordArgument, ReplaceDtype, ReplaceException)
    return found | {operator.__name__: operator() for operator in own}


def _has_effect(statement: Any) -> bool:
    if statement.type in ("raise_stmt", "del_stmt"):
        return True
    if statement.type == "expr_stmt":
        return bool(statement.children[0].type == "atom_expr")
    last = statement.get_last_leaf()
    return bool(statement.type == "atom_expr" and last == ")")


def _keywords(node: Any) -> Iterator[tuple[int, Any]]:
    if node.type not in ("arglist", "trailer"):
        return
    for at, child in enumerate(node.children):
        if child.type == "argument" and len(child.children) == 3 and child.children[1] == "=":
            yield at, child

"""Every public name of qsvd says what it takes: each argument is in its docstring."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest

import qsvd
from qsvd.integrations import peft, transformers

OFFERED = {
    **{name: getattr(qsvd, name) for name in qsvd.__all__ if name != "__version__"},
    "accelerate": peft.accelerate,
    "restore": peft.restore,
    "RankAllocatorCallback": transformers.RankAllocatorCallback,
}


def documented() -> Iterator[tuple[str, Any]]:
    """The public functions and classes, and the methods that these define, by name."""
    for name, value in OFFERED.items():
        yield name, value
        if not inspect.isclass(value):
            continue
        for base in value.__mro__:
            if not base.__module__.startswith("qsvd"):
                continue
            for method, function in vars(base).items():
                if isinstance(function, property):
                    yield f"{name}.{method}", function
                elif inspect.isroutine(getattr(base, method)) and not method.startswith("_"):
                    yield f"{name}.{method}", getattr(base, method)


DOCUMENTED = dict(documented())


def arguments(function: Callable[..., Any]) -> list[str]:
    """What a caller passes, but for `**options`."""
    parameters = inspect.signature(function).parameters.values()
    return [p.name for p in parameters if p.name not in ("self", "cls") and p.kind < 4]


@pytest.mark.parametrize("name", DOCUMENTED)
def test_it_has_a_docstring_that_names_its_arguments(name: str) -> None:
    value = DOCUMENTED[name]
    text = inspect.getdoc(value) or ""
    assert text
    if isinstance(value, property) or name.startswith("RankAllocatorCallback.on_"):
        return
    if inspect.isclass(value) and issubclass(value, Warning):
        return
    if inspect.isclass(value) and value is not qsvd.SVDLayer and issubclass(value, qsvd.SVDLayer):
        return  # its constructor is the base class's
    lacking = [a for a in arguments(value) if not re.search(rf"^\s*\**{a}: ", text, re.MULTILINE)]
    assert lacking == []

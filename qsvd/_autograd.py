"""Autograd functions, applied with less ado."""

from __future__ import annotations

from typing import Any

import torch


def is_eager() -> bool:
    """Whether operations run as they are called: nothing is compiled, no function is transformed."""
    return not (torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active())


def apply(function: type[torch.autograd.Function], *arguments: Any) -> Any:
    """`function.apply`, or `function.forward` without grad mode.

    `apply` of `torch.autograd.Function` first binds default arguments with `inspect.signature`, which
    takes as long as the rest of it. Here there are none, and outside of transforms it does no more.
    """
    if not torch.is_grad_enabled():
        return function.forward(*arguments)
    if is_eager():
        return super(torch.autograd.Function, function).apply(*arguments)  # type: ignore[misc]
    return function.apply(*arguments)  # type: ignore[no-untyped-call]

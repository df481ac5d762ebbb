"""What a mutant is: the honest layer with one planted fault, and the clauses that it breaks."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, TypeVar, get_args

import torch
from torch import Tensor

from conformance.port import Allocation, Arithmetic, Constructor, Port
from conformance.spec import Kind
from tests.mutants import honest
from tests.mutants.honest_allocator import HonestAllocator, HonestConfig, HonestPenalty

T = TypeVar("T", bound=type[honest.HonestLayer])
R = TypeVar("R", bound=type[HonestAllocator] | type[HonestPenalty])
BASES: dict[Kind, type[honest.HonestLayer]] = {
    "4bit": honest.SVDLinear4bit,
    "8bit": honest.SVDLinear8bitLt,
}


# What is wrong: every kind has mutants, and a test says so.
Fault = Literal[
    "arithmetic",
    "broadcasting",
    "masks",
    "dtype",
    "autograd",
    "aliasing",
    "state",
    "adapters",
    "merge",
    "dispatch",
    "boundary",
    "initialisation",
    "refusals",
]
# Where alone it shows: the corners into which a bug withdraws when the common case is tested.
Corner = Literal[
    "fp32",
    "bf16",
    "fp16",
    "4-bit",
    "8-bit",
    "train",
    "eval",
    "autocast",
    "second call",
    "second adapter",
    "negative E",
    "large values",
    "checkpointing",
    "compiled",
    "backward",
    "second backward",
    "17 rows",
    "33 rows",
    "65 rows",
    "129 rows",
    "empty batch",
    "in not a multiple of 64",
    "rank zero",
    "r = 1",
    "r > in",
    "r > out",
    "non-contiguous x",
    "non-contiguous gradient",
    "NaN",
]
FAULTS: tuple[Fault, ...] = get_args(Fault)
CORNERS: tuple[Corner, ...] = get_args(Corner)


@dataclass(frozen=True)
class Mutant:
    """A bug, by name, the port that has it, the clauses that must notice, and what it is."""

    name: str
    port: Port
    kills: tuple[str, ...]
    kind: Fault
    only: Corner | None = None

    @property
    def in_layer(self) -> bool:
        """Whether the layer is at fault, and not what is offered beside it."""
        return self.home != "RANK"

    @property
    def home(self) -> str:
        """The chapter to which the fault belongs: that of the first clause that must notice."""
        return chapter_of(self.kills[0])


MUTANTS: dict[str, Mutant] = {}


def chapter_of(clause: str) -> str:
    """FWD-12 belongs to FWD."""
    return clause.partition("-")[0]


def over_both_bases(fault: type[Any]) -> dict[Kind, Constructor]:
    """The fault mixed into both honest layers, under names by which pickle finds them."""
    constructors: dict[Kind, Constructor] = {}
    for kind, base in BASES.items():
        name = f"{fault.__name__}{kind}"
        layer = type(name, (fault, base), {"__module__": fault.__module__, "__qualname__": name})
        setattr(sys.modules[fault.__module__], name, layer)
        constructors[kind] = layer
    return constructors


def mutant(
    name: str,
    kills: tuple[str, ...],
    *,
    kind: Fault,
    only: Corner | None = None,
    arithmetic: Arithmetic = "input",
) -> Callable[[T], T]:
    """Enter a faulty layer into the gallery.

    Args:
        name: the bug, as one would say it.
        kills: the clauses that must fail, each for at least one kind of base layer; the first is of
            the chapter to which the fault belongs.
        kind: what is wrong.
        only: where alone it shows, if it does not show everywhere.
        arithmetic: what the port declares; "input" has the wider bounds, and is harder to judge.
    """

    def enter(fault: T) -> T:
        _enter(Mutant(name, Port(name, "0", over_both_bases(fault), arithmetic), kills, kind, only))
        return fault

    return enter


def rank_mutant(
    name: str, kills: tuple[str, ...], *, kind: Fault, only: Corner | None = None
) -> Callable[[R], R]:
    """Enter a faulty allocator or penalty into the gallery, over honest layers."""

    def enter(fault: R) -> R:
        _enter(Mutant(name, rank_port(name, fault), kills, kind, only))
        return fault

    return enter


def rank_port(name: str, part: type[HonestAllocator] | type[HonestPenalty]) -> Port:
    """A port of honest layers whose allocator or penalty is `part`, and the other one honest."""
    faulty_penalty = issubclass(part, HonestPenalty)
    allocation = Allocation(HonestConfig, HonestAllocator if faulty_penalty else part)
    penalty = part() if issubclass(part, HonestPenalty) else HonestPenalty()
    return Port(name, "0", dict(BASES), "float32", allocation, penalty)


def _enter(entry: Mutant) -> None:
    if entry.name in MUTANTS:
        raise ValueError(f"There is a mutant named {entry.name!r} already.")
    MUTANTS[entry.name] = entry


class _Tampered(torch.autograd.Function):
    """The identity, but for what its backward makes of the gradient."""

    @staticmethod
    def forward(ctx: Any, t: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.change = change
        return t.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return ctx.change(gradient), None


def tampered(t: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
    """t, whose gradient passes through `change` on its way back."""
    result: Tensor = _Tampered.apply(t, change)  # type: ignore[no-untyped-call]
    return result

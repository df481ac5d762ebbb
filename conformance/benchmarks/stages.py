"""Where a step's time goes: its operations by kind, their seconds, bytes and flops."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from conformance.benchmarks.results import Stage
from conformance.benchmarks.timing import Clock

_PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "addmv", "mv", "dot", "_int_mm", "linear")
_COPIES = (
    "_to_copy",
    "copy_",
    "clone",
    "cat",
    "contiguous",
    "stack",
    "zeros",
    "zeros_like",
    "fill_",
    "zero_",
)
_RANDOM = (
    "bernoulli_",
    "bernoulli",
    "native_dropout",
    "random_",
    "randint",
    "rand_like",
    "rand",
    "uniform_",
)
# They give memory, and move nothing.
_NOTHING = ("empty", "empty_like", "empty_strided", "new_empty", "set_", "detach", "alias")
KINDS = ("quantised weight", "products", "casts and copies", "random numbers", "the rest")
_KIND_OF = {
    **dict.fromkeys(_PRODUCTS, "products"),
    **dict.fromkeys(_COPIES, "casts and copies"),
    **dict.fromkeys(_RANDOM, "random numbers"),
}


@dataclass
class Operation:
    """One call of torch's dispatcher. Its signature: name, shapes and dtypes."""

    kind: str
    signature: tuple[Any, ...]
    seconds: float
    bytes: int
    flops: int


class Trace(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Records every operation under it, backward's too: on a CPU that runs in the same thread."""

    def __init__(self, clock: Clock, wait: Callable[[], None] = lambda: None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.operations: list[Operation] = []
        self._clock = clock
        self._wait = wait

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        given = dict(kwargs or {})
        self._wait()
        start = self._clock()
        result = func(*args, **given)
        self._wait()
        seconds = self._clock() - start
        name = func.overloadpacket.__name__
        if not (func.is_view or name in _NOTHING or _is_a_view(func, args, result)):
            count = flop_registry.get(_out_of_place(func))
            self.operations.append(
                Operation(
                    kind=kind_of(func),
                    signature=(str(func), *_forms([*args, *given.values()])),
                    seconds=seconds,
                    bytes=_bytes([*args, *given.values()]) + _bytes([result]),
                    flops=int(count(*args, **given, out_val=result)) if count else 0,
                )
            )
        return result


def kind_of(func: Any) -> str:
    """One of `KINDS`."""
    if func.namespace == "bitsandbytes":
        return "quantised weight"
    name = func.overloadpacket.__name__
    return _KIND_OF.get(name) or _KIND_OF.get(_out_of_place(func).__name__, "the rest")


def traced(step: Callable[[], object], clock: Clock, wait: Callable[[], None]) -> list[Operation]:
    """A step's operations, in their order."""
    with Trace(clock, wait) as trace:
        step()
    found: list[Operation] = trace.operations
    return found


def beside(mine: Iterable[Operation], base: Iterable[Operation]) -> list[Operation]:
    """The operations that a base layer does not do: each of its own takes one of the same signature away."""
    left = Counter(o.signature for o in base)
    found = []
    for operation in mine:
        if left[operation.signature] > 0:
            left[operation.signature] -= 1
        else:
            found.append(operation)
    return found


def stages(
    step: Callable[[], object],
    base: Sequence[Operation],
    clock: Clock,
    wait: Callable[[], None] = lambda: None,
    repeats: int = 5,
) -> tuple[Stage, ...]:
    """What a step does beside its base layer's operations, by kind: the median seconds of a few steps."""
    traces = [beside(traced(step, clock, wait), base) for _ in range(repeats)]
    found = []
    for kind in KINDS:
        last = [o for o in traces[-1] if o.kind == kind]
        seconds = [sum(o.seconds for o in operations if o.kind == kind) for operations in traces]
        found.append(
            Stage(
                kind=kind,
                operations=len(last),
                seconds=statistics.median(seconds),
                bytes=sum(o.bytes for o in last),
                flops=sum(o.flops for o in last),
            )
        )
    return tuple(found)


def _out_of_place(func: Any) -> Any:
    """The operation that does the same without writing its first argument; itself, if it writes none."""
    packet = func.overloadpacket
    name = packet.__name__.removesuffix("_")
    return getattr(getattr(torch.ops, func.namespace), name, packet)


def _is_a_view(func: Any, args: Sequence[Any], result: Any) -> bool:
    """Also of operations that are views of some inputs only, such as `reshape` and `_to_copy`."""
    if func._schema.is_mutable or not isinstance(result, Tensor):
        return False
    at = result.untyped_storage()._cdata
    return any(isinstance(a, Tensor) and a.untyped_storage()._cdata == at for a in args)


def _bytes(values: Iterable[Any]) -> int:
    total = 0
    for value in values:
        if isinstance(value, Tensor):
            # A broadcast tensor is read as often as its memory has elements.
            total += min(value.numel() * value.element_size(), value.untyped_storage().nbytes())
        elif isinstance(value, (list, tuple)):
            total += _bytes(value)
    return total


def _forms(values: Iterable[Any]) -> list[Any]:
    """Shape and dtype of every tensor."""
    found: list[Any] = []
    for value in values:
        if isinstance(value, Tensor):
            found.append((tuple(value.shape), value.dtype))
        elif isinstance(value, (list, tuple)):
            found += _forms(value)
    return found

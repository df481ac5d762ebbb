"""Playing a case on a port: one forward, one backward, and the tensors that came out."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from conformance.case import Case, Data
from conformance.port import Port
from conformance.trial import Run, Trial
from tests.mutants.asking import unchanged_torch

Tensors = dict[str, torch.Tensor]
CPU = torch.device("cpu")


def play(port: Port, case: Case, data: Data) -> Tensors | None:
    """What the port returns, by names like `y`, `dx`, `dA default`; None where it raised or left out one.

    Every call gets a fresh base layer, so that what a port does to it stays its own affair.
    """
    with untouched():
        try:
            run = Trial(port=port, kind=case.kind).build(case, data=data).run()
        except Exception:
            # Whatever a port raises is a rejection by every rule, and which does not matter here.
            return None
        return tensors(run, case)


def tensors(run: Run, case: Case) -> Tensors | None:
    """A run's tensors by name; None where a gradient is missing."""
    found: dict[str, torch.Tensor | None] = {"y": run.y, "dx": run.dx}
    for part, gradients in (("dA", run.dA), ("dE", run.dE), ("dB", run.dB)):
        found |= {f"{part} {n}": g for n, g in zip(case.names, gradients, strict=True)}
    complete = {name: tensor.detach() for name, tensor in found.items() if tensor is not None}
    return complete if len(complete) == len(found) else None


@contextlib.contextmanager
def untouched() -> Iterator[None]:
    """Nothing that a port does to torch outlives its play, its random numbers included."""
    generator = torch.get_rng_state()
    try:
        with unchanged_torch():
            yield
    finally:
        torch.set_rng_state(generator)


def same(one: Tensors | None, other: Tensors | None) -> bool:
    """Whether two plays returned the same values everywhere, NaN equal to NaN."""
    if one is None or other is None:
        return one is other
    return all(
        one[name].shape == other[name].shape
        and torch.equal(
            torch.nan_to_num(one[name].double()), torch.nan_to_num(other[name].double())
        )
        for name in other
    )

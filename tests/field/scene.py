"""A scene: one case, and all that is the same for every port that plays it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch

from conformance import oracle
from conformance.case import Case, Data, as_dtype, as_float64
from conformance.oracle import Arithmetic, Bounded, Gradients
from conformance.port import Arithmetic as Declared
from conformance.trial import Setup, Trial
from conformance.values import draw
from tests.field.eager import LOW, PLAIN
from tests.field.ours import ENOUGH
from tests.field.play import Tensors, play, untouched
from tests.field.reading import F64, Expected, Part, Reading, Size
from tests.field.sizes import sizes
from tests.reference.pipelines import Pipeline, pipelines


@dataclass(frozen=True)
class Scene:
    """A case, its data, what is expected of each tensor, and what the eager layer returned."""

    case: Case
    data: Data
    expected: Mapping[str, Expected]
    eager: Tensors

    def readings(self, got: Tensors | None, arithmetic: Declared) -> list[Reading] | None:
        """What the rules see of a play; None where there is nothing to compare."""
        if got is None:
            return None
        found = []
        for name, expected in self.expected.items():
            if got[name].shape != expected.reference.shape:
                return None
            found.append(Reading(expected, got[name].to(expected.reference.dtype), arithmetic))
        return found


def build(case: Case) -> Scene | None:
    """The scene of a case; None where a conforming layer may overflow, so that nothing can be asked."""
    data = draw(case)
    with untouched():
        setup = Trial(port=PLAIN, kind=case.kind).build(case, data=data)
        base = setup.base_run()
    adapters = setup.adapters()
    permissive, strict = Arithmetic.permissive(case.dtype), Arithmetic.strict(case.dtype)
    if not oracle.in_domain(data.x, adapters, base.y, permissive):
        return None
    eager, low = play(PLAIN, case, data), play(LOW, case, data)
    if eager is None or low is None:
        raise RuntimeError(f"The eager layers cannot play {case}.")
    wide, narrow = (_bounds(setup, base.y, base.dx, a) for a in (permissive, strict))
    exact = _exact(setup, base.y, base.dx)
    size = sizes(data.x, adapters, data.dout, base.y, base.dx)
    noise = {
        cast(Declared, declared): _noise(setup, base.y, base.dx, arithmetic, wide)
        for declared, arithmetic in (("input", permissive), ("float32", strict))
    }
    expected = {
        name: _expected(
            name, case, wide[name], narrow[name], eager[name], low[name], exact, size, noise
        )
        for name in wide
    }
    return Scene(case, data, expected, eager)


def _expected(
    name: str,
    case: Case,
    wide: Bounded,
    narrow: Bounded,
    eager: torch.Tensor,
    low: torch.Tensor,
    exact: Tensors,
    size: Mapping[str, Size],
    noise: Mapping[Declared, Mapping[str, tuple[float, float]]],
) -> Expected:
    dtype = case.torch_dtype if name in ("y", "dx") else torch.float32
    return Expected(
        part=cast(Part, name.partition(" ")[0]),
        io=case.dtype,
        truth=wide.value,
        reference=as_dtype(wide.value, dtype),
        eager=eager.to(dtype),
        low=low.to(dtype),
        size=size[name],
        strict=narrow.bound,
        permissive=wide.bound,
        exact=exact.get(name),
        noise={declared: found[name] for declared, found in noise.items()},
    )


def _bounds(
    setup: Setup, y: torch.Tensor, dx: torch.Tensor | None, arithmetic: Arithmetic
) -> dict[str, Bounded]:
    """Value and bound of every tensor, given the base layer's y and dx."""
    x, dout, adapters = setup.data.x, setup.data.dout, setup.adapters()
    gradients = oracle.expected_gradients(x, adapters, dout, dx, arithmetic)
    return {
        "y": oracle.expected_output(x, adapters, y, arithmetic),
        "dx": gradients.dx,
        **_named(setup.case, gradients),
    }


def _named(case: Case, gradients: Gradients) -> dict[str, Bounded]:
    return {
        f"{part} {name}": bounded
        for part in ("dA", "dE", "dB")
        for name, bounded in zip(case.names, getattr(gradients, part), strict=True)
    }


def _exact(setup: Setup, y: torch.Tensor, dx: torch.Tensor | None) -> Tensors:
    """The bits that the exact lane promises on a dyadic case, where it promises any."""
    case, data, adapters = setup.case, setup.data, setup.adapters()
    if case.values != "dyadic":
        return {}
    found: Tensors = {}
    output = oracle.exact_output(data.x, adapters, y, case.torch_dtype)
    if output is not None:
        found["y"] = output
    if len(adapters) == 1:
        parts = oracle.exact_gradients(data.x, adapters[0], data.dout, dx, case.torch_dtype)
        found |= {p if p == "dx" else f"{p} {case.names[0]}": t for p, t in parts.items()}
    return found


def _noise(
    setup: Setup,
    y: torch.Tensor,
    dx: torch.Tensor | None,
    arithmetic: Arithmetic,
    truth: Mapping[str, Bounded],
) -> dict[str, tuple[float, float]]:
    """By tensor, the rms error of the first simulated pipeline, and the largest of all of them."""
    if setup.case.dtype == "float32" or all(b.value.size < ENOUGH for b in truth.values()):
        return dict.fromkeys(truth, (0.0, 0.0))  # nobody asks
    runs = [_simulate(setup, y, dx, pipeline) for pipeline in pipelines(arithmetic, ("blas",))]
    errors = {
        name: [_rms(run[name].reshape(wanted.value.shape) - wanted.value) for run in runs]
        for name, wanted in truth.items()
    }
    return {name: (found[0], max(found)) for name, found in errors.items()}


def _simulate(
    setup: Setup, y: torch.Tensor, dx: torch.Tensor | None, pipeline: Pipeline
) -> dict[str, F64]:
    case, data, adapters = setup.case, setup.data, setup.adapters()
    x, dout = (a.reshape(-1, a.shape[-1]) for a in (data.x, data.dout))
    base_dx = np.zeros_like(x) if dx is None else as_float64(dx).reshape(x.shape)
    found = {"y": pipeline.output(x, adapters, as_float64(y).reshape(dout.shape))}
    found["dx"], leaves = pipeline.gradients(x, adapters, dout, base_dx)
    for name, gradients in zip(case.names, leaves, strict=True):
        found |= {f"{p} {name}": g for p, g in zip(("dA", "dE", "dB"), gradients, strict=True)}
    return found


def _rms(error: F64) -> float:
    return float(np.sqrt(np.mean(error**2))) if error.size else 0.0

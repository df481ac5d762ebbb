"""One case judged: expected values and bounds once for each arithmetic, then every implementation."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cache
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from conformance import oracle
from conformance.case import Case, Data, as_float64, build_base
from conformance.oracle import Arithmetic, Bounded
from conformance.port import Port, load_port
from conformance.trial import Run, Setup, Trial
from conformance.values import draw
from reference import gradients_in_domain
from tests.calibration.drawing import masks_of
from tests.mutants.variants import VARIANTS

Operation = Literal["y", "y from the weight", "dx", "dA", "dE", "dB"]
OPERATIONS: tuple[Operation, ...] = ("y", "y from the weight", "dx", "dA", "dE", "dB")
Rule = Literal["strict", "permissive"]
RULES: tuple[Rule, ...] = ("strict", "permissive")
Expected = Mapping[Operation, list[Bounded]]


class Finding(NamedTuple):
    """The largest error / bound of one operation, by one implementation, in one case."""

    implementation: str
    rule: Rule
    operation: Operation
    ratio: float


@cache
def implementations() -> dict[str, Port]:
    """Every honest variant, qsvd and PEFT."""
    loaded = (load_port(spec) for spec in ("qsvd", "conformance.ports.peft"))
    return {**VARIANTS, **{f"{port.name} {port.version}": port for port in loaded}}


class Mask(nn.Module):
    """Dropout that keeps what it is told to keep, in the way of torch's: x * (keep / (1 - p))."""

    def __init__(self, keep: np.ndarray, p: float) -> None:
        super().__init__()
        self.keep, self.p = torch.from_numpy(keep), p

    def forward(self, x: Tensor) -> Tensor:
        return x * self.keep.to(x.dtype).div_(1.0 - self.p)


def judge(case: Case) -> Iterator[Finding]:
    """What every implementation makes of the case, where it is in the bounds' domain."""
    masks, data = masks_of(case), draw(case)
    # One base layer for all: every call is in the dtype of the first, which is what it latches.
    base = build_base(case, data, torch.device("cpu"))
    wanted: dict[Rule, Expected] = {}
    for name, port in implementations().items():
        setup = _setup(case, data, base, port, masks)
        if not wanted:
            wanted = expected(setup, masks)
        run = setup.run()
        for rule, judged in wanted.items():
            # What may round to the input's dtype has made no promise to the strict bounds.
            if rule == "strict" and port.arithmetic == "input":
                continue
            for operation, bounds in judged.items():
                yield Finding(name, rule, operation, _worst(_results(run, operation), bounds))


def expected(setup: Setup, masks: Mapping[str, np.ndarray]) -> dict[Rule, Expected]:
    """Values and bounds of each operation, by arithmetic; what is out of the domain is left out."""
    case = setup.case
    adapters, base = setup.adapters(dict(masks) or None), setup.base_run()
    # In float32 both arithmetics are the same.
    rules: tuple[Rule, ...] = ("strict",) if case.dtype == "float32" else RULES
    return {
        rule: {
            **_outputs(setup, adapters, base.y, getattr(Arithmetic, rule)(case.dtype)),
            **_gradients(setup, adapters, base.dx, getattr(Arithmetic, rule)(case.dtype)),
        }
        for rule in rules
    }


def _setup(
    case: Case, data: Data, base: nn.Module, port: Port, masks: Mapping[str, np.ndarray]
) -> Setup:
    """`Trial.build` over a base layer that is there already, with dropout masks that are known."""
    trial = Trial(port=port, kind=case.kind)
    layer = trial.construct(base, case.names[0], r=case.ranks[0], lora_alpha=case.alpha(0))
    setup = Setup(trial, case, data, base, layer)
    for index, name in enumerate(case.names[1:], start=1):
        setup.add_adapter(name, index)
    layer.train(case.training)
    setup.layer.set_adapter(list(case.names))
    setup.install()
    for index, (name, keep) in enumerate(masks.items()):
        setup.layer.lora_dropout[name] = Mask(keep, case.dropout(index))
    return setup


def _outputs(
    setup: Setup, adapters: list[oracle.Adapter], base: Tensor, arithmetic: Arithmetic
) -> Expected:
    case, x = setup.case, setup.data.x
    if not oracle.in_domain(x, adapters, base, arithmetic):
        return {}
    found: dict[Operation, list[Bounded]] = {
        "y": [oracle.expected_output(x, adapters, base, arithmetic)]
    }
    # An 8-bit base quantises its activations in eval mode: no function of the weight alone.
    if case.kind == "4bit" or case.training:
        weight = (
            oracle.weight_4bit(setup.data.weight, case.quant_type, setup.nested_offset())
            if case.kind == "4bit"
            else oracle.weight_8bit(setup.data.weight)
        )
        y = oracle.expected_output_from_weight(x, weight, setup.data.bias, adapters, arithmetic)
        if y is not None:
            found["y from the weight"] = [y]
    return found


def _gradients(
    setup: Setup, adapters: list[oracle.Adapter], base_dx: Tensor | None, arithmetic: Arithmetic
) -> Expected:
    x, dout = setup.data.x, setup.data.dout
    given = None if base_dx is None else as_float64(base_dx)
    if not gradients_in_domain(x, adapters, dout, given, arithmetic):
        return {}
    gradients = oracle.expected_gradients(x, adapters, dout, base_dx, arithmetic)
    return {
        "dx": [gradients.dx],
        "dA": list(gradients.dA),
        "dE": list(gradients.dE),
        "dB": list(gradients.dB),
    }


def _results(run: Run, operation: Operation) -> list[Tensor | None]:
    if operation in ("y", "y from the weight"):
        return [run.y]
    if operation == "dx":
        return [run.dx]
    return list({"dA": run.dA, "dE": run.dE, "dB": run.dB}[operation])


def _worst(results: list[Tensor | None], bounds: list[Bounded]) -> float:
    """The largest error / bound; infinite where something is missing, NaN, or no exact zero."""
    worst = 0.0
    for result, (value, bound) in zip(results, bounds, strict=True):
        if result is None:
            return np.inf
        error = np.abs(as_float64(result) - value)
        if not np.isfinite(error).all():
            return np.inf
        with np.errstate(divide="ignore", invalid="ignore"):
            ratio = np.where(error == 0.0, 0.0, error / bound)
        worst = max(worst, float(ratio.max(initial=0.0)))
    return worst

"""A scene for the clauses on rank allocation: a small model of the port's layers and its allocator.

The suite writes weights and gradients into the layers, so that every importance is known to a bound, and
reads off E which triplets an allocation kept. Nothing else of an allocator is looked at: not its names,
not where it keeps its averages.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from conformance import oracle
from conformance.case import Case, as_dtype, as_float64, build_base
from conformance.devices import seed_generators
from conformance.trial import Trial, require_plain
from conformance.values import draw
from conformance.violation import NotProvided, Violation

PARTS = ("A", "E", "B")
# (in, out) of the model's layers: a mean taken over the wrong axis, or left out, is off by a factor.
SHAPES = ((8, 5), (3, 17))
ADAPTER = "default"
Array = NDArray[np.floating]
Shapes = Sequence[tuple[int, int]]
# One layer's A (r, in), E (r, 1), B (out, r); None where a weight has no gradient.
Values = Mapping[str, Array]
Gradients = Mapping[str, Array | None]
# By layer, which triplets have a singular value that is not zero.
Kept = list[list[bool]]


@dataclass(frozen=True)
class Observation:
    """What an allocator meets in one step: weights and gradients by layer, and the loss scale.

    The gradients are multiplied by the scale already.
    """

    weights: Sequence[Values]
    gradients: Sequence[Gradients]
    scale: float = 1.0

    @property
    def finite(self) -> bool:
        """Whether a loss scaler lets the step happen."""
        given = (g for layer in self.gradients for g in layer.values() if g is not None)
        return all(bool(np.isfinite(g).all()) for g in given)


@dataclass(frozen=True)
class Settings:
    """PEFT's fields of a schedule; left out, the budget falls over ten steps, from step 1 on."""

    tinit: int = 0
    tfinal: int = 2
    deltaT: int = 1
    total_step: int = 12
    init_r: int = 2
    target_r: int = 1
    beta1: float = 0.85
    beta2: float = 0.85

    @classmethod
    def after(cls, warmup: int, **given: Any) -> Settings:
        """The budget falls over ten steps, from step `warmup` + 1 on."""
        return cls(tinit=warmup, total_step=warmup + 12, **given)

    @property
    def settled(self) -> int:
        """The step of the last allocation."""
        return self.total_step - self.tfinal

    def allocates(self, step: int) -> bool:
        """Whether the budget is handed out anew at `step`."""
        falling = self.tinit < step < self.settled
        return step == self.settled or (falling and step % self.deltaT == 0)

    def budgets(self, step: int, ranks: Sequence[int]) -> tuple[int, int]:
        """The least and the largest number that may be the budget of `step`."""
        return oracle.budget_range(
            step,
            initial=sum(ranks),
            final=self.target_r * len(ranks),
            tinit=self.tinit,
            tfinal=self.tfinal,
            total_step=self.total_step,
        )


@dataclass
class Scene:
    """A model of the port's layers, `model.layers[i]`, with an allocator of one adapter."""

    trial: Trial
    settings: Settings
    model: nn.Module
    layers: list[Any]
    ranks: Sequence[int]
    allocator: Any
    adapter: str = ADAPTER

    def parameter(self, layer: int, part: str, adapter: str | None = None) -> nn.Parameter:
        found: nn.Parameter = getattr(self.layers[layer], f"lora_{part}")[adapter or self.adapter]
        return found

    def show(self, seen: Observation) -> None:
        """Write one step's weights and gradients into the layers."""
        for index in range(len(self.layers)):
            for part in PARTS:
                parameter = self.parameter(index, part)
                write(parameter, seen.weights[index][part])
                gradient = seen.gradients[index][part]
                parameter.grad = (
                    None if gradient is None else as_dtype(gradient, parameter.dtype).to(parameter)
                )

    def step(self, number: int, scale: float = 1.0) -> int:
        """Call the allocator, which is told the scale only where there is one."""
        self.trial.calls += 1
        told = {} if scale == 1.0 else {"grad_scale": scale}
        if told and not _takes(self.allocator.step, 0, **told):
            raise Violation("`step` takes no `grad_scale`: a scaled loss decides what is kept.")
        budget = self.allocator.step(number, **told)
        least, largest = self.settings.budgets(number, self.ranks)
        self.trial.assert_that(
            type(budget) is int and least <= budget <= largest,
            f"step({number}) returns the budget {budget!r}, expected {least}"
            + (f" or {largest}" if largest != least else "")
            + f", with {self.settings}.",
        )
        return int(budget)

    def observe(self, number: int, seen: Observation) -> int:
        """Show one step, and let the allocator take it."""
        self.show(seen)
        return self.step(number, seen.scale)

    def become(self, other: Scene) -> None:
        """Go on with another model and its allocator, as a run that was interrupted does."""
        self.model, self.layers, self.allocator = other.model, other.layers, other.allocator

    def kept(self) -> Kept:
        """By layer, which triplets have a singular value that is not zero."""
        singular = [self.parameter(index, "E") for index in range(len(self.layers))]
        for index, E in enumerate(singular):
            require_plain(f"layers.{index}.lora_E", E)
        return [(as_float64(E)[:, 0] != 0).tolist() for E in singular]

    def assert_kept(self, expected: Kept, when: str) -> None:
        """Exactly these triplets are alive."""
        got = self.kept()
        self.trial.assert_that(
            got == expected, f"{when}, the layers keep {got}, expected {expected} by importance."
        )

    def assert_budget(self, number: int, budget: int) -> None:
        """As many triplets are alive as `step` says."""
        count = sum(map(sum, self.kept()))
        self.trial.assert_that(
            count == budget,
            f"step({number}) keeps {count} of {sum(self.ranks)} triplets, its budget is {budget}.",
        )


def write(parameter: nn.Parameter, values: Array) -> None:
    """Other values for a parameter, as an optimizer would write them."""
    with torch.no_grad():
        parameter.copy_(torch.from_numpy(np.asarray(values, dtype=np.float64)))


def build_model(
    trial: Trial,
    case: Case,
    shapes: Shapes,
    ranks: Sequence[int],
    adapters: Sequence[str] = (ADAPTER,),
) -> tuple[nn.Module, list[Any]]:
    """A model with the port's layers in it; adapters after the first are there, and not active.

    torch's generator is seeded, so that a case is the same wherever it runs.
    """
    seed_generators(case.seed, trial.device)
    layers = []
    for index, ((inner, outer), rank) in enumerate(zip(shapes, ranks, strict=True)):
        own = Case(case.kind, in_features=inner, out_features=outer, seed=case.seed + index)
        base = build_base(own, draw(own), trial.device)
        layer: Any = trial.construct(base, adapters[0], r=rank, lora_alpha=3)
        for name in adapters[1:]:
            layer.update_layer(name, rank, 3, lora_dropout=0.0, init_lora_weights=True)
        layers.append(layer)
    model = nn.Module()
    model.layers = nn.ModuleList(layers)
    return model, layers


def build_scene(
    trial: Trial,
    case: Case,
    settings: Settings,
    shapes: Shapes = SHAPES,
    ranks: Sequence[int] | None = None,
    adapters: Sequence[str] = (ADAPTER,),
) -> Scene:
    """A model and the port's allocator for the first of its adapters; all ranks are init_r by default.

    Raises:
        NotProvided: when the port offers no allocator.
        Violation: when what it offers is none.
    """
    offered = trial.port.allocation
    if offered is None:
        raise NotProvided("the port offers no RankAllocator")
    given = [settings.init_r] * len(shapes) if ranks is None else ranks
    model, layers = build_model(trial, case, shapes, given, adapters)
    trial.calls += 1
    allocator = offered.allocator(model, offered.config(**vars(settings)), adapters[0])
    require_methods(allocator, "step")
    return Scene(trial, settings, model, layers, given, allocator, adapters[0])


def require_methods(allocator: Any, *names: str) -> None:
    """Refuse half an allocator by name.

    Raises:
        Violation: when a method is missing.
    """
    missing = [name for name in names if not callable(getattr(allocator, name, None))]
    if missing:
        raise Violation(
            f"The allocator has no {' and no '.join(f'`{name}`' for name in missing)}; chapter RANK "
            "of SPEC.md says what an allocator has."
        )


def require_penalty(trial: Trial) -> Callable[[nn.Module, str], torch.Tensor]:
    """The port's penalty, each call of it counted and looked at.

    Raises:
        NotProvided: when the port offers none.
    """
    penalty = trial.port.penalty
    if penalty is None:
        raise NotProvided("the port offers no orthogonal_penalty")

    def counted(model: nn.Module, adapter: str) -> torch.Tensor:
        trial.calls += 1
        value = penalty(model, adapter)
        if not isinstance(value, torch.Tensor):
            raise Violation(f"The penalty is a {type(value).__name__}, expected a scalar tensor.")
        require_plain("the penalty", value)
        return value

    return counted


def _takes(function: Callable[..., Any], *given: Any, **named: Any) -> bool:
    """Whether a call with these arguments would get as far as the function's body."""
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # nothing is known of it, so it is called
        return True
    try:
        signature.bind(*given, **named)
    except TypeError:
        return False
    return True

"""The measurement: every port plays every case of a batch, and every rule says what it thinks of it."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cache
from typing import Any

import numpy as np

from conformance.case import DType
from conformance.port import Port, PortError, load_port
from conformance.spec import Kind
from tests.field.batches import batch, nominal
from tests.field.ours import OURS, SECOND
from tests.field.play import play, same
from tests.field.reading import Reading
from tests.field.rules import RULES, Rule
from tests.field.scene import Scene, build
from tests.mutants.gallery import MUTANTS
from tests.mutants.variants import VARIANTS

ALL_RULES: Mapping[str, Rule] = {**RULES, **OURS, **SECOND}
# A mutant must err more than this many times as much as any honest layer to count as one.
VISIBLE = 2.0
# They are the eager layer itself: a rule that compares with it has nothing to say about them.
THE_EAGER_LAYER = ("the honest layer", "the honest layer, held to the wider bounds")


@dataclass
class Tally:
    """What became of one port in one batch; `rejected` and `nominal` count cases by rule.

    differs: some value differs from the eager layer's. visible: its error stands out, see `Batch`.
    """

    cases: int = 0
    nominal_cases: int = 0
    differs: bool = False
    visible: bool = False
    rejected: list[int] = field(default_factory=lambda: [0] * len(ALL_RULES))
    nominal: list[int] = field(default_factory=lambda: [0] * len(ALL_RULES))

    def add(self, verdicts: Sequence[bool], is_nominal: bool) -> None:
        self.cases += 1
        self.nominal_cases += is_nominal
        for index, accepted in enumerate(verdicts):
            self.rejected[index] += not accepted
            self.nominal[index] += is_nominal and not accepted


@dataclass
class Batch:
    """One seed, one layer, one dtype: what every port and every rule made of its cases.

    A mutant is *visible* if on some case, in some tensor, its largest error exceeds twice the
    largest error of all honest layers there. What never does is as near to the truth as layers that
    are right, and counts neither for nor against a rule. Where all honest layers are exact, as on
    dyadic data, any error stands out.
    """

    kind: Kind
    dtype: DType
    number: int
    scenes: int = 0
    out_of_range: int = 0
    honest: dict[str, Tally] = field(default_factory=dict)
    mutants: dict[str, Tally] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, given: dict[str, Any]) -> Batch:
        tallies = {
            group: {name: Tally(**tally) for name, tally in given[group].items()}
            for group in ("honest", "mutants")
        }
        return cls(**{**given, **tallies})


@cache
def honest_ports() -> dict[str, Port]:
    """The variants, our own layers, and PEFT's where it is installed."""
    ports = {name: port for name, port in VARIANTS.items() if name not in THE_EAGER_LAYER}
    ports["qsvd"] = load_port("qsvd")
    with contextlib.suppress(PortError):
        ports["PEFT"] = load_port("conformance.ports.peft")
    return ports


def run_batch(
    kind: Kind, dtype: DType, number: int, random: int, mutants: Sequence[str] | None = None
) -> Batch:
    """Play one batch; all mutants of the layer, or those named."""
    layers = [name for name, mutant in MUTANTS.items() if mutant.in_layer]
    chosen = {name: MUTANTS[name].port for name in (layers if mutants is None else mutants)}
    found = Batch(
        kind,
        dtype,
        number,
        honest={name: Tally() for name in honest_ports()},
        mutants={name: Tally() for name in chosen},
    )
    for case in batch(kind, dtype, number, random):
        scene = build(case)
        if scene is None:
            found.out_of_range += 1
            continue
        found.scenes += 1
        worst = _honest(scene, found)
        _mutants(scene, found, chosen, worst)
    return found


def _honest(scene: Scene, found: Batch) -> dict[str, float]:
    """Let the honest layers play; returns each tensor's largest error, the two eager layers' included."""
    eager = _errors(scene.readings(scene.eager, "input") or [], scene)
    low = {name: Reading(e, e.low).worst for name, e in scene.expected.items()}
    worst = {name: max(eager[name], low[name]) for name in scene.expected}
    for name, port in honest_ports().items():
        if not port.provides(scene.case.kind):
            continue
        readings = scene.readings(play(port, scene.case, scene.data), port.arithmetic)
        found.honest[name].add(verdicts(readings, honest=port), nominal(scene.case))
        for tensor, error in _errors(readings or [], scene).items():
            if np.isfinite(error):
                worst[tensor] = max(worst[tensor], error)
    return worst


def _mutants(
    scene: Scene, found: Batch, chosen: Mapping[str, Port], worst: Mapping[str, float]
) -> None:
    unchanged = verdicts(scene.readings(scene.eager, "input"))
    for name, port in chosen.items():
        tally, got = found.mutants[name], play(port, scene.case, scene.data)
        if same(got, scene.eager):
            tally.add(unchanged, nominal(scene.case))
            continue
        readings = scene.readings(got, port.arithmetic)
        tally.differs = True
        tally.add(verdicts(readings), nominal(scene.case))
        tally.visible |= readings is None or any(
            error > VISIBLE * worst[tensor] for tensor, error in _errors(readings, scene).items()
        )


def verdicts(readings: Sequence[Reading] | None, honest: Port | None = None) -> list[bool]:
    """By rule, whether it accepts all tensors of a play; a play that did not come off, none does.

    A rule that is not used for a dtype accepts everything in it; so does one that only holds for
    fp32 adapters, of an honest port that does not declare them.
    """
    if readings is None:
        return [False] * len(ALL_RULES)
    return [_accepts(rule, readings, honest) for rule in ALL_RULES.values()]


def _accepts(rule: Rule, readings: Sequence[Reading], honest: Port | None) -> bool:
    if rule.for_fp32_adapters and honest is not None and honest.arithmetic != "float32":
        return True
    return all(rule(r) for r in readings if r.expected.io in rule.dtypes)


def _errors(readings: Sequence[Reading], scene: Scene) -> dict[str, float]:
    return {name: r.worst for name, r in zip(scene.expected, readings, strict=False)}

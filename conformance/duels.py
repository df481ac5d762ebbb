"""Duels: two triplets so nearly equal in importance that every part of its definition decides who is kept.

An allocator tells nobody its scores, only whom it keeps. So the scores are brought as near to each other
as the rounding errors of a conforming evaluation allow, and whatever is computed otherwise picks the other.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from conformance import oracle
from conformance.allocation import (
    PARTS,
    SHAPES,
    Array,
    Gradients,
    Kept,
    Observation,
    Scene,
    Settings,
    Shapes,
    build_scene,
)
from conformance.case import Case
from conformance.trial import Trial

# The first triplet of each layer fights; the second is to score this many times what the first do.
_STRONG = 2.0**10
_ATTEMPTS = 60


def draw_observation(
    rng: np.random.Generator,
    shapes: Shapes = SHAPES,
    ranks: Sequence[int] = (2, 2),
    parts: Sequence[str] = PARTS,
) -> Observation:
    """Random weights, none of them zero, and gradients of several magnitudes; only `parts` have any."""
    weights, gradients = [], []
    for (inner, outer), rank in zip(shapes, ranks, strict=True):
        sizes = {"A": (rank, inner), "E": (rank, 1), "B": (outer, rank)}
        weights.append({p: _rounded(_away_from_zero(rng, s)) for p, s in sizes.items()})
        gradients.append(
            {
                p: _rounded(_away_from_zero(rng, s) * np.exp(rng.normal(0, 1)) * (p in parts))
                for p, s in sizes.items()
            }
        )
    return Observation(weights, gradients)


class Ledger:
    """What a conforming allocator knows after the steps that it was shown: averages, with their errors."""

    def __init__(self, first: Observation, settings: Settings) -> None:
        self._settings = settings
        self._seen = [
            {part: oracle.unobserved(weights[part].shape) for part in PARTS}
            for weights in first.weights
        ]

    def observe(self, step: Observation) -> None:
        """A step with a gradient that is not finite is none, nor is one of a weight without a gradient."""
        if not step.finite:
            return
        for seen, weights, gradients in zip(self._seen, step.weights, step.gradients, strict=True):
            for part, gradient in gradients.items():
                if gradient is not None:
                    seen[part] = oracle.observe(
                        seen[part],
                        weights[part],
                        gradient / step.scale,
                        self._settings.beta1,
                        self._settings.beta2,
                    )

    def scores(self) -> list[oracle.Bounded]:
        """S (r,) by layer, and the most by which a port may be off."""
        return [oracle.bound_importance(seen["A"], seen["E"], seen["B"]) for seen in self._seen]


def importances(course: Sequence[Observation], settings: Settings) -> list[oracle.Bounded]:
    """The scores after all steps of a course."""
    ledger = Ledger(course[0], settings)
    for step in course:
        ledger.observe(step)
    return ledger.scores()


def expected_choice(scores: Sequence[oracle.Bounded], count: int) -> Kept | None:
    """Which triplets a budget keeps, by layer; None where rounding may decide."""
    keep = oracle.most_important([s.value for s in scores], count)
    value, bound = (np.concatenate([s[i] for s in scores]) for i in (0, 1))
    chosen = np.concatenate(keep)
    if chosen.any() and not chosen.all():
        least = (value - bound)[chosen].min()
        if not least > (value + bound)[~chosen].max():
            return None
    return [k.tolist() for k in keep]


def duel(
    course: Sequence[Observation], settings: Settings, winner: int
) -> tuple[list[Observation], Kept]:
    """A course in which the first triplet of layer `winner` barely beats that of the other layer.

    The loser's gradients are scaled until the two scores, which grow with the scale's square, are apart
    by hardly more than what a conforming implementation may be off. Whatever else changes the ratio
    of the two scores changes who is masked, in this duel or in the one that the other layer wins.

    Returns:
        The course, and which triplets a budget of three keeps, by layer.
    """
    loser = 1 - winner
    course = list(course)
    scores = importances(course, settings)
    course = scaled(course, loser, 0, _ratio(scores[winner].value[0], scores[loser].value[0]))
    for layer in (winner, loser):
        strong = _STRONG * scores[winner].value[0]
        course = scaled(course, layer, 1, _ratio(strong, scores[layer].value[1]))
    expected = [[True, True], [True, True]]
    expected[loser][0] = False
    for attempt in range(1, _ATTEMPTS):
        scores = importances(course, settings)
        if expected_choice(scores, 3) == expected:
            return course, expected
        low = scores[winner].value[0] - scores[winner].bound[0]
        high = scores[loser].value[0] + scores[loser].bound[0]
        course = scaled(course, loser, 0, _ratio(low, high) * (1 - attempt * 2.0**-23))
    raise AssertionError("# sanity: no scale separates the two triplets.")


def assert_duels(
    trial: Trial,
    case: Case,
    course: Sequence[Observation],
    betas: tuple[float, float],
    show: Callable[[Scene, int, Observation], int] = Scene.observe,
) -> None:
    """Each of the two layers' first triplets barely wins once, and the port masks the other.

    The course is observed during the warm-up, but for its last step, in which the budget is three.
    `show` is how a step is brought before the allocator.
    """
    settings = Settings.after(len(course) - 1, beta1=betas[0], beta2=betas[1])
    for winner in (0, 1):
        shown, expected = duel(course, settings, winner)
        scene = build_scene(trial, case, settings)
        for number, step in enumerate(shown, start=1):
            show(scene, number, step)
        scene.assert_kept(expected, f"after {len(course)} steps")


def scaled(
    course: Sequence[Observation], layer: int, triplet: int, factor: float
) -> list[Observation]:
    """The course with the gradients of one triplet multiplied, and rounded to what fp32 holds."""
    return [
        replace(
            step,
            gradients=[
                _scaled(given, triplet, factor) if index == layer else given
                for index, given in enumerate(step.gradients)
            ],
        )
        for step in course
    ]


def _scaled(gradients: Gradients, triplet: int, factor: float) -> Gradients:
    changed: dict[str, Array | None] = {}
    for part, gradient in gradients.items():
        if gradient is not None:
            gradient = gradient.copy()
            rows = gradient.T if part == "B" else gradient
            rows[triplet] = _rounded(rows[triplet] * factor)
        changed[part] = gradient
    return changed


def _ratio(wanted: float, had: float) -> float:
    """What to multiply gradients by, so that a score becomes another."""
    return float(np.sqrt(wanted / had))


def _rounded(values: Array) -> Array:
    """As fp32 holds it."""
    return np.asarray(values, dtype=np.float32).astype(np.float64)


def _away_from_zero(rng: np.random.Generator, shape: tuple[int, ...]) -> Array:
    """Of either sign, and of a size between 1/4 and 2."""
    return np.asarray(rng.uniform(0.25, 2.0, shape) * rng.choice([-1.0, 1.0], shape))

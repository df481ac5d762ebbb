"""Chapter RANK: importance, budget and masks of a port's rank allocator, and the orthogonal penalty."""

from __future__ import annotations

import copy
import io
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

from conformance import oracle
from conformance.allocation import (
    ADAPTER,
    PARTS,
    SHAPES,
    Observation,
    Scene,
    Settings,
    Shapes,
    build_model,
    build_scene,
    require_methods,
    require_penalty,
    write,
)
from conformance.case import Case, as_float64
from conformance.duels import Ledger, assert_duels, draw_observation, expected_choice
from conformance.spec import Kind, clause
from conformance.trial import Trial

BETAS = (0.85, 0.85)
# Unlike each other and unlike the defaults; the last two nearly forget, and nearly remember all.
UNEQUAL_BETAS = ((0.5, 0.9), (0.9, 0.25), (0.05, 0.97), (0.99, 0.1))


def seeds(kind: Kind) -> SearchStrategy[Case]:
    """Everything about a scene follows from its seed."""
    return st.builds(Case, st.just(kind), seed=st.integers(0, 2**20))


def probes(kind: Kind, count: int = 4) -> list[Case]:
    return [Case(kind, seed=seed) for seed in range(count)]


def random_course(case: Case, steps: int, parts: Sequence[str] = PARTS) -> list[Observation]:
    rng = np.random.default_rng(case.seed)
    return [draw_observation(rng, parts=parts) for _ in range(steps)]


def betas_of(case: Case) -> tuple[float, float]:
    return UNEQUAL_BETAS[case.seed % len(UNEQUAL_BETAS)]


# --- importance -------------------------------------------------------------------------------------


@clause("RANK-1")
def test_the_sensitivity_is_the_size_of_weight_times_gradient(trial: Trial) -> None:
    def body(case: Case) -> None:
        part = PARTS[case.seed % len(PARTS)]
        assert_duels(trial, case, random_course(case, 1, parts=(part,)), BETAS)

    trial.search(seeds(trial.kind), body, probes(trial.kind, 3), cost=2)


@clause("RANK-2")
def test_sensitivities_are_smoothed_with_beta1(trial: Trial) -> None:
    def body(case: Case) -> None:
        # With a short memory of uncertainty, the mean is most of what the steps before the last leave.
        beta1 = betas_of(case)[0]
        assert_duels(trial, case, random_course(case, 5, parts=("E",)), (beta1, 2.0**-6))

    trial.search(seeds(trial.kind), body, probes(trial.kind), cost=2)


@clause("RANK-3")
def test_the_uncertainty_is_smoothed_with_beta2(trial: Trial) -> None:
    def body(case: Case) -> None:
        assert_duels(trial, case, random_course(case, 5, parts=("E",)), betas_of(case))

    trial.search(seeds(trial.kind), body, probes(trial.kind), cost=2)


@clause("RANK-4")
def test_a_triplet_has_the_importance_of_its_three_parts(trial: Trial) -> None:
    def body(case: Case) -> None:
        assert_duels(trial, case, random_course(case, 3), betas_of(case))

    trial.search(seeds(trial.kind), body, probes(trial.kind), cost=2)


# --- budget and masks -------------------------------------------------------------------------------

SCHEDULES = (
    Settings(tinit=3, tfinal=4, deltaT=1, total_step=20, init_r=6, target_r=2),
    Settings(tinit=0, tfinal=0, deltaT=3, total_step=17, init_r=5, target_r=1),
    Settings(tinit=4, tfinal=5, deltaT=3, total_step=24, init_r=3, target_r=2),
    Settings(tinit=0, tfinal=1, deltaT=1, total_step=2, init_r=4, target_r=1),
)


def run_of(
    case: Case, settings: Settings, shapes: Shapes = SHAPES, ranks: Sequence[int] | None = None
) -> list[Observation]:
    """One observation a step, from step 0 to the last."""
    rng = np.random.default_rng(case.seed)
    given = [settings.init_r] * len(shapes) if ranks is None else ranks
    return [draw_observation(rng, shapes, given) for _ in range(settings.total_step + 1)]


@clause("RANK-5")
def test_the_budget_falls_cubically_between_two_constants(trial: Trial) -> None:
    def body(case: Case) -> None:
        settings = SCHEDULES[case.seed % len(SCHEDULES)]
        scene = build_scene(trial, case, settings)
        for number, seen in enumerate(run_of(case, settings)):
            scene.observe(number, seen)  # compares what `step` returns

    trial.check(body, probes(trial.kind, len(SCHEDULES)))


@clause("RANK-6")
def test_masking_has_its_steps(trial: Trial) -> None:
    def body(case: Case) -> None:
        settings = SCHEDULES[case.seed % len(SCHEDULES)]
        scene = build_scene(trial, case, settings)
        for number, seen in enumerate(run_of(case, settings)):
            scene.observe(number, seen)
            due = number > settings.settled or settings.allocates(number)
            masked = not all(all(layer) for layer in scene.kept())
            trial.assert_that(
                masked == due,
                f"step({number}) masks {'something' if masked else 'nothing'} with {settings}.",
            )

    trial.check(body, probes(trial.kind, len(SCHEDULES)))


@clause("RANK-7")
def test_the_budget_goes_to_the_most_important(trial: Trial) -> None:
    shapes = (*SHAPES, (5, 5), (4, 4))

    def body(case: Case) -> None:
        beta1, beta2 = betas_of(case)
        settings = replace(SCHEDULES[case.seed % len(SCHEDULES)], beta1=beta1, beta2=beta2)
        ranks = (settings.init_r, settings.init_r + 1, settings.init_r, 0)
        course = run_of(case, settings, shapes, ranks)
        if case.seed % 2:
            course = [_favouring(seen, 2, None, 2.0**-12) for seen in course]  # it loses all
        scene = build_scene(trial, case, settings, shapes, ranks)
        ledger = Ledger(course[0], settings)
        for number, seen in enumerate(course[: settings.settled + 1]):
            budget = scene.observe(number, seen)
            if number < settings.settled:  # at the last allocation nothing is observed any more
                ledger.observe(seen)
            if not settings.allocates(number):
                continue
            scene.assert_budget(number, budget)
            expected = expected_choice(ledger.scores(), budget)
            if expected is not None:
                scene.assert_kept(expected, f"at step {number}")

    trial.search(seeds(trial.kind), body, probes(trial.kind), cost=4)


def equal_observation(ranks: Sequence[int] = (2, 2), gradient: float = 0.0) -> Observation:
    """Every triplet as important as every other: all weights one, all gradients the same."""
    weights, gradients = [], []
    for (inner, outer), rank in zip(SHAPES, ranks, strict=True):
        sizes = {"A": (rank, inner), "E": (rank, 1), "B": (outer, rank)}
        weights.append({p: np.ones(s) for p, s in sizes.items()})
        gradients.append({p: np.full(s, gradient) for p, s in sizes.items()})
    return Observation(weights, gradients)


@clause("RANK-8")
def test_ties_do_not_cost_more_than_the_budget(trial: Trial) -> None:
    def body(case: Case) -> None:
        settings = Settings(init_r=4, target_r=2)
        scene = build_scene(trial, case, settings)
        # After steps without gradients every score is zero; with equal ones, those of a layer are equal.
        seen = equal_observation((4, 4), gradient=float(case.seed % 2))
        for number in range(1, settings.total_step + 1):
            scene.assert_budget(number, scene.observe(number, seen))

    trial.check(body, probes(trial.kind, 2))


@clause("RANK-9")
def test_the_same_run_makes_the_same_choice(trial: Trial) -> None:
    def body(case: Case) -> None:
        settings = Settings(init_r=4, target_r=2)
        seen = equal_observation((4, 4), gradient=float(case.seed % 2))
        choices: list[list[Any]] = []
        for attempt in range(3):
            scene = build_scene(trial, case, settings)
            torch.manual_seed(attempt)
            choices.append([])
            for number in range(1, settings.total_step + 1):
                scene.observe(number, seen)
                choices[-1].append(scene.kept())
        trial.assert_that(
            choices[0] == choices[1] == choices[2], f"Three equal runs choose {choices}."
        )

    trial.check(body, probes(trial.kind, 2))


@clause("RANK-10")
def test_nothing_is_to_be_pruned(trial: Trial) -> None:
    def body(case: Case) -> None:
        settings = Settings(init_r=2, target_r=2)
        scene = build_scene(trial, case, settings)
        for number, seen in enumerate(run_of(case, settings)):
            scene.observe(number, seen)
            scene.assert_kept([[True, True], [True, True]], f"at step {number}")

    trial.check(body, probes(trial.kind, 1))


# --- gradients as training leaves them --------------------------------------------------------------


@clause("RANK-11")
def test_a_weight_without_a_gradient_is_not_observed(trial: Trial) -> None:
    def body(case: Case) -> None:
        rng = np.random.default_rng(case.seed)
        course = random_course(case, 6)
        for number in range(1, len(course)):
            missing = [dict(layer) for layer in course[number].gradients]
            # A layer that took no part, then one weight that is frozen for a step.
            layer = int(rng.integers(len(SHAPES)))
            for part in PARTS if number % 2 else (PARTS[rng.integers(len(PARTS))],):
                missing[layer][part] = None
            course[number] = replace(course[number], gradients=missing)
        assert_duels(trial, case, course, betas_of(case))

    trial.search(seeds(trial.kind), body, probes(trial.kind), cost=2)


@clause("RANK-12")
def test_accumulated_gradients_are_one_gradient(trial: Trial) -> None:
    def body(case: Case) -> None:
        rng = np.random.default_rng(case.seed)

        def accumulate(scene: Scene, number: int, seen: Observation) -> int:
            """The step's gradient g in two backward passes: g / 2 twice, or 2 g and -g."""
            scene.show(seen)
            for index in range(len(scene.layers)):
                for part in PARTS:
                    parameter = scene.parameter(index, part)
                    whole = parameter.grad
                    assert whole is not None
                    parameter.grad = None
                    first = whole * float(rng.choice([0.5, 2.0]))
                    for gradient in (first, whole - first):  # exact, and so is their sum
                        torch.autograd.backward((parameter * gradient).sum())
            return scene.step(number)

        assert_duels(trial, case, random_course(case, 4), betas_of(case), accumulate)

    trial.check(body, probes(trial.kind, 3))


@clause("RANK-13")
def test_the_loss_scale_does_not_enter(trial: Trial) -> None:
    def body(case: Case) -> None:
        course = random_course(case, 5)
        # As a scaler backs off after an overflow, and grows again: powers of two, so exactly.
        for number, scale in enumerate((2.0**16, 2.0**16, 2.0**15, 2.0**15, 2.0**17)):
            course[number] = _multiplied(course[number], scale)
        assert_duels(trial, case, course, betas_of(case))

    trial.check(body, probes(trial.kind, 3))


def _multiplied(seen: Observation, scale: float) -> Observation:
    gradients = [
        {p: None if g is None else g * scale for p, g in layer.items()} for layer in seen.gradients
    ]
    return Observation(seen.weights, gradients, scale)


@clause("RANK-14")
def test_an_overflow_is_forgotten(trial: Trial) -> None:
    def body(case: Case) -> None:
        course = random_course(case, 5)
        # One weight of one layer is enough for the scaler; the others are as finite as ever.
        spoilt = copy.deepcopy(course[2])
        gradient = spoilt.gradients[case.seed % len(SHAPES)][PARTS[case.seed % len(PARTS)]]
        assert gradient is not None
        gradient[-1, 0] = (np.inf, -np.inf, np.nan)[case.seed % 3]
        course[2] = spoilt
        assert_duels(trial, case, course, betas_of(case))

    trial.check(body, probes(trial.kind, 6))


@clause("RANK-15")
def test_adapters_whose_names_contain_one_another_are_independent(trial: Trial) -> None:
    def body(case: Case) -> None:
        adapters = ("a", "ab") if case.seed < 2 else ("ab", "a")
        settings = Settings(init_r=2, target_r=1)
        scene = build_scene(trial, case, settings, adapters=adapters)
        others = {
            (layer, part): scene.parameter(layer, part, adapters[1])
            for layer in range(len(SHAPES))
            for part in PARTS
        }
        for (layer, _), parameter in others.items():
            write(parameter, np.full(parameter.shape, 0.5 + layer))
            # Both are trained at once, or the other one is frozen.
            parameter.grad = torch.full_like(parameter, 3.0) if case.seed % 2 else None
        before = {key: p.detach().clone() for key, p in others.items()}
        course = run_of(case, settings)[1 : settings.settled]
        ledger = Ledger(course[0], settings)
        for number, seen in enumerate(course, start=1):
            budget = scene.observe(number, seen)
            ledger.observe(seen)
            scene.assert_budget(number, budget)
            expected = expected_choice(ledger.scores(), budget)
            if expected is not None:
                scene.assert_kept(expected, f"beside {adapters[1]!r}, at step {number}")
            for (layer, part), parameter in others.items():
                what = f"layers.{layer}.lora_{part}.{adapters[1]}"
                trial.assert_same_bits(what, parameter.detach(), before[layer, part])

    trial.check(body, probes(trial.kind, 4))


# --- what an allocation changes ---------------------------------------------------------------------


def _tensors(scene: Scene) -> dict[str, torch.Tensor]:
    """A copy of the model's parameters, buffers and gradients, by name."""
    model = scene.model
    found = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    grads = {f"{n}.grad": p.grad for n, p in model.named_parameters() if p.grad is not None}
    return {name: t.detach().clone() for name, t in {**found, **grads}.items()}


def _facts(scene: Scene) -> dict[str, Any]:
    """What an optimizer and a forward rely on beside values: which parameters there are, and how used."""
    facts: dict[str, Any] = {
        name: (id(p), p.requires_grad) for name, p in scene.model.named_parameters()
    }
    for index, layer in enumerate(scene.layers):
        for name in ("r", "scaling", "lora_alpha", "active_adapters", "training"):
            # One that a layer lacks is the business of ADPT-8.
            facts[f"layers.{index}.{name}"] = copy.copy(getattr(layer, name, None))
    return facts


@clause("RANK-16")
def test_an_allocation_masks_singular_values_and_nothing_else(trial: Trial) -> None:
    def body(case: Case) -> None:
        settings = Settings.after(2, init_r=3, target_r=1)
        scene = build_scene(trial, case, settings)
        facts = _facts(scene)
        for number, seen in enumerate(run_of(case, settings)):
            scene.show(seen)
            before = _tensors(scene)
            scene.step(number)
            after = _tensors(scene)
            changed = [name for name, fact in _facts(scene).items() if facts.get(name) != fact]
            trial.assert_that(
                not changed and after.keys() == before.keys(),
                f"step({number}) changes or replaces {', '.join(changed) or 'gradients'}.",
            )
            for name, old in before.items():
                if f".lora_E.{scene.adapter}" in name and not name.endswith(".grad"):
                    # What is not zero has its bits; what is zero was masked.
                    old = torch.where(after[name] == 0, 0.0, old)
                trial.assert_same_bits(f"{name} after step({number})", after[name], old)

    trial.check(body, probes(trial.kind, 2))


def _favouring(seen: Observation, layer: int, triplet: int | None, factor: float) -> Observation:
    """One triplet of a layer, or all of it, with larger or smaller gradients than it had."""
    changed = copy.deepcopy(seen)
    for part, gradient in changed.gradients[layer].items():
        assert gradient is not None
        (gradient.T if part == "B" else gradient)[slice(None) if triplet is None else triplet] *= (
            factor
        )
    return changed


@clause("RANK-17")
def test_a_masked_triplet_may_return(trial: Trial) -> None:
    def body(case: Case) -> None:
        settings = Settings.after(2)
        course = run_of(case, settings)
        scene = build_scene(trial, case, settings)
        for number in (1, 2, 3):
            scene.observe(number, _favouring(course[number], 0, 0, 2.0**-20))
        trial.assert_that(not scene.kept()[0][0], "The least important triplet is not masked.")
        for number in (4, 5):
            # The optimizer moves a masked E away from zero again: its gradient is not zero.
            scene.observe(number, _favouring(course[number], 0, 0, 2.0**20))
        trial.assert_that(
            scene.kept()[0][0], "The most important triplet is masked, because it was before."
        )

    trial.check(body, probes(trial.kind, 2))


@clause("RANK-18")
def test_the_last_choice_is_final(trial: Trial) -> None:
    def body(case: Case) -> None:
        settings = Settings(tinit=2, tfinal=5, total_step=12)
        course = run_of(case, settings)
        scene = build_scene(trial, case, settings)
        for number in range(settings.settled + 1):
            scene.observe(number, course[number])
        final = scene.kept()
        for number in range(settings.settled + 1, settings.total_step + 1):
            seen = course[number]
            # Whatever was masked would win now, if anybody asked.
            for triplet, kept in enumerate(final[0]):
                seen = _favouring(seen, 0, triplet, 2.0**-20 if kept else 2.0**20)
            scene.observe(number, seen)
            scene.assert_kept(final, f"at step {number}, after the last choice")

    trial.check(body, probes(trial.kind, 2))


def _saved(scene: Scene) -> Any:
    """The allocator's state as a file brings it back."""
    require_methods(scene.allocator, "state_dict", "load_state_dict")
    file = io.BytesIO()
    torch.save(scene.allocator.state_dict(), file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@clause("RANK-19")
def test_a_resumed_run_goes_on(trial: Trial) -> None:
    def body(case: Case) -> None:
        settings = Settings(tinit=2, tfinal=3, total_step=14, init_r=4, beta1=betas_of(case)[0])
        course = run_of(case, settings)
        whole = build_scene(trial, case, settings)
        states, masks = [], []
        for number, seen in enumerate(course):
            whole.observe(number, seen)
            masks.append(whole.kept())
            states.append(_saved(whole))
        # In the warm-up, while the budget falls, at its end, and in the final phase.
        for stop in (1, 6, settings.settled, settings.settled + 1):
            resumed = build_scene(trial, case, settings)
            resumed.allocator.load_state_dict(states[stop])
            for number in range(stop + 1, len(course)):
                resumed.observe(number, course[number])
                resumed.assert_kept(masks[number], f"resumed after step {stop}, at step {number}")

        def interrupted(scene: Scene, number: int, seen: Observation) -> int:
            if number == 4:
                again = build_scene(trial, case, scene.settings)
                again.allocator.load_state_dict(_saved(scene))
                scene.become(again)
            return scene.observe(number, seen)

        # To the last bit: so little decides a duel.
        assert_duels(trial, case, random_course(case, 5), betas_of(case), interrupted)

    trial.check(body, probes(trial.kind, 2))


# --- the penalty ------------------------------------------------------------------------------------


def _factors(model_layers: Sequence[Any], name: str) -> list[torch.nn.Parameter]:
    return [getattr(layer, f"lora_{part}")[name] for layer in model_layers for part in ("A", "B")]


def _as_factors(parameters: Sequence[torch.nn.Parameter]) -> list[np.ndarray]:
    """F (r, n): A as it is, B transposed."""
    return [as_float64(p).T if i % 2 else as_float64(p) for i, p in enumerate(parameters)]


@clause("RANK-20")
def test_the_penalty_is_the_mean_distance_from_orthonormal(trial: Trial) -> None:
    def body(case: Case) -> None:
        penalty = require_penalty(trial)
        model, layers = build_model(trial, case, (*SHAPES, (5, 5)), (2, 4, 1))
        rng = np.random.default_rng(case.seed)
        for parameter in _factors(layers, ADAPTER):
            write(parameter, rng.normal(0, rng.choice([0.02, 0.5, 3.0]), parameter.shape))
        expected, _ = oracle.bound_penalty(_as_factors(_factors(layers, ADAPTER)))
        trial.assert_within("the penalty", penalty(model, ADAPTER), expected)

    trial.search(seeds(trial.kind), body, probes(trial.kind, 2), cost=2)


@clause("RANK-21")
def test_the_penaltys_gradient(trial: Trial) -> None:
    def body(case: Case) -> None:
        penalty = require_penalty(trial)
        model, layers = build_model(trial, case, (*SHAPES, (5, 5)), (2, 3, 1))
        rng = np.random.default_rng(case.seed)
        parameters = _factors(layers, ADAPTER)
        for number, parameter in enumerate(parameters):
            # The first two are orthonormal exactly, and the norm has no derivative there.
            values = np.eye(*parameter.shape) if number < 2 else rng.normal(0, 0.5, parameter.shape)
            write(parameter, values)
        torch.autograd.backward(penalty(model, ADAPTER))
        _, expected = oracle.bound_penalty(_as_factors(parameters))
        for number, (parameter, slope) in enumerate(zip(parameters, expected, strict=True)):
            gradient = parameter.grad
            if number % 2 and gradient is not None:
                gradient = gradient.T
            what = f"the gradient of layers.{number // 2}.lora_{'B' if number % 2 else 'A'}"
            trial.assert_within(what, gradient, slope)
        for layer in layers:
            got = layer.lora_E[ADAPTER].grad
            trial.assert_that(
                got is None or not got.any(), "The penalty has a gradient in E, which it is not of."
            )

    trial.search(seeds(trial.kind), body, probes(trial.kind, 2), cost=2)


@clause("RANK-22")
def test_the_penalty_is_of_one_adapter(trial: Trial) -> None:
    def body(case: Case) -> None:
        penalty = require_penalty(trial)
        adapters = ("a", "ab") if case.seed % 2 else ("ab", "a")
        model, layers = build_model(trial, case, SHAPES, (2, 2), adapters)
        for parameter in _factors(layers, adapters[1]):
            write(parameter, np.full(parameter.shape, 3.0))
        expected, _ = oracle.bound_penalty(_as_factors(_factors(layers, adapters[0])))
        got = penalty(model, adapters[0])
        trial.assert_within(f"the penalty of {adapters[0]!r} beside {adapters[1]!r}", got, expected)

    trial.check(body, probes(trial.kind, 2))

"""Chapter ENV: what a port shares a process with, and leaves alone."""

from __future__ import annotations

import random
from collections.abc import Callable

import numpy as np
import torch

from conformance.case import DTYPES, Case
from conformance.spec import Kind, clause
from conformance.surroundings import Tripwire, differences, read_settings, replaced_functions
from conformance.trial import Setup, Trial, require_plain


def _cases(kind: Kind) -> list[Case]:
    return [
        Case(kind, dtype, 8, 5, (3,), (3, 2), dropouts=dropouts, training=training)
        for dtype in DTYPES
        for training in (True, False)
        for dropouts in ((), (0.5, 0.25))
    ]


def _life(trial: Trial, case: Case) -> list[tuple[str, Callable[[], object]]]:
    """What a layer goes through, step by step: each step has a name."""
    made: list[Setup] = []
    return [
        ("construction", lambda: made.append(trial.build(case))),
        ("forward", lambda: made[0].forward()),
        ("forward and backward", lambda: made[0].run()),
        ("a change of mode", lambda: made[0].layer.train(not case.training)),
        ("forward in the other mode", lambda: made[0].forward()),
        ("a second backward", lambda: made[0].run()),
    ]


@clause("ENV-1")
def test_global_state_is_left_alone(trial: Trial) -> None:
    def body(case: Case) -> None:
        found = trial.port.changed_by_loading
        trial.assert_that(not found, f"After the port was loaded, {'; '.join(found)}.")
        for what, step in _life(trial, case):
            before = read_settings()
            step()
            changes = differences(before)
            trial.assert_that(not changes, f"After {what}, {'; '.join(changes)}.")

    trial.check(body, _cases(trial.kind))


@clause("ENV-2")
def test_generators_are_left_alone(trial: Trial) -> None:
    def body(case: Case) -> None:
        def states() -> tuple[str, str]:
            return repr(random.getstate()), repr(np.random.get_state(legacy=False))

        ends: list[bytes] = []
        for what, step in _life(trial, case):
            before = states()
            step()
            for whose, old, new in zip(("Python", "NumPy"), before, states(), strict=True):
                trial.assert_that(
                    old == new, f"{what} draws from {whose}'s generator, or seeds it."
                )
        for seed in (1, 2):
            setup = trial.build(case)
            torch.manual_seed(seed)
            setup.run()
            ends.append(torch.random.get_rng_state().numpy().tobytes())
        trial.assert_that(ends[0] != ends[1], "forward or backward seeds torch's generator.")
        ends.clear()
        for seed in (1, 2):
            setup = trial.build(case)
            torch.manual_seed(seed)
            trial.calls += 1
            setup.layer.update_layer("another", 2, 1, lora_dropout=0.0, init_lora_weights=True)
            ends.append(torch.random.get_rng_state().numpy().tobytes())
        trial.assert_that(ends[0] != ends[1], "A new adapter seeds torch's generator.")

    trial.check(body, _cases(trial.kind))


@clause("ENV-3")
def test_functions_of_others_are_left_alone(trial: Trial) -> None:
    def body(case: Case) -> None:
        found = trial.port.replaced_by_loading
        trial.assert_that(not found, f"Loading the port replaced {', '.join(found)}.")
        for what, step in _life(trial, case):
            step()
            replaced = list(replaced_functions())
            trial.assert_that(not replaced, f"{what} replaced {', '.join(replaced)}.")

    trial.check(body, _cases(trial.kind))


@clause("ENV-4")
def test_results_are_plain_tensors(trial: Trial) -> None:
    def body(case: Case) -> None:
        setup = trial.build(case)
        run = setup.run()
        for what, tensors in (
            ("y", (run.y,)),
            ("dx", (run.dx,)),
            ("dA", run.dA),
            ("dE", run.dE),
            ("dB", run.dB),
        ):
            for tensor in tensors:
                require_plain(what, tensor)
                trial.assert_that(tensor is not None, f"{what} is missing.")

    trial.check(body, [case for case in _cases(trial.kind) if not case.dropouts])


@clause("ENV-5")
def test_the_port_computes_for_itself(trial: Trial) -> None:
    def body(case: Case) -> None:
        found = trial.port.reached_by_loading
        trial.assert_that(not found, f"Loading the port imported {', '.join(found)}.")
        for what, step in _life(trial, case):
            with Tripwire() as wire:
                step()
            trial.assert_that(not wire.reached, f"{what} imported {', '.join(wire.reached)}.")

    trial.check(body, _cases(trial.kind))

"""Chapter STATE: checkpoints, copies, modes, and what must not outlive a call."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch

from conformance.case import DTYPES, Case
from conformance.spec import clause
from conformance.strategies import probes
from conformance.test_forward import assert_output
from conformance.test_gradients import assert_gradients, assert_same_run
from conformance.trial import Setup, Trial

PARAMETERS = ("lora_A", "lora_E", "lora_B")


def layers(trial: Trial) -> list[Case]:
    """Layers of every dtype with two adapters, a bias, and shapes that every base layer survives."""
    return [
        Case(trial.kind, dtype, 64, 32, (4,), (3, 2), bias=True, seed=number)
        for number, dtype in enumerate(DTYPES)
    ]


def assert_same_state(
    trial: Trial, what: str, got: Mapping[str, Any], expected: Mapping[str, Any]
) -> None:
    """Two state dicts have the same keys and the same bits."""
    differing = sorted(set(got) ^ set(expected))
    trial.assert_that(not differing, f"{what}: the keys {differing} are in one state only.")
    for key, value in expected.items():
        if isinstance(value, torch.Tensor):
            trial.assert_same_bits(f"{what}: {key}", got[key], value, same_dtype=True)


def snapshot(layer: torch.nn.Module) -> dict[str, Any]:
    """A state dict that later writes do not reach."""
    return copy.deepcopy(dict(layer.state_dict()))


@clause("STATE-1")
def test_checkpoint_keys_are_pefts(trial: Trial) -> None:
    def body(case: Case) -> None:
        setup = trial.build(case)
        keys = set(setup.layer.state_dict())
        for name in case.names:
            for part in (*PARAMETERS, "ranknum"):
                key = f"{part}.{name}"
                trial.assert_that(key in keys, f"`state_dict` lacks {key}; it has {sorted(keys)}.")
        trial.assert_that("base_layer.weight" in keys, "`state_dict` lacks base_layer.weight.")
        own = {k for k in keys if not k.startswith("base_layer.")}
        wanted = {f"{part}.{name}" for part in (*PARAMETERS, "ranknum") for name in case.names}
        trial.assert_that(own == wanted, f"`state_dict` has keys of its own: {own - wanted}.")

    trial.check(body, layers(trial))


@clause("STATE-2")
def test_a_state_dict_restores_the_layer(trial: Trial) -> None:
    def body(case: Case) -> None:
        setup = trial.build(case)
        y = setup.forward()
        buffer = io.BytesIO()
        torch.save(setup.layer.state_dict(), buffer)
        buffer.seek(0)
        saved = torch.load(buffer, weights_only=True)
        adapters = {k: v for k, v in saved.items() if not k.startswith("base_layer.")}

        fresh = trial.build(case, values=False)
        trial.calls += 1
        # The base layer is there already, as for users who load an adapter: bitsandbytes' own
        # 4-bit layer cannot load its own quantisation state.
        loaded = fresh.layer.load_state_dict(adapters, strict=False)
        trial.assert_that(
            not loaded.unexpected_keys, f"Keys were not expected: {loaded.unexpected_keys}."
        )
        trial.assert_same_bits("y of the restored layer", fresh.forward(), y)

    trial.check(body, layers(trial))


def assert_copy(trial: Trial, setup: Setup, duplicate: Any, what: str) -> None:
    """A copy computes the same bits, and shares no adapter parameter."""
    run = setup.run()
    trial.assert_same_bits(f"y of {what}", setup.forward(layer=duplicate), run.y)
    assert_same_run(trial, f"of {what}", setup.run(layer=duplicate), run)
    own = {p.data_ptr() for p in setup.layer.parameters() if p.numel()}
    shared = [n for n, p in duplicate.named_parameters() if p.numel() and p.data_ptr() in own]
    trial.assert_that(not shared, f"{what} shares its parameters {shared} with the original.")
    for name in setup.case.names:
        with torch.no_grad():
            duplicate.lora_E[name].add_(1.0)
    trial.assert_same_bits(f"y of the original after a write into {what}", setup.forward(), run.y)
    trial.assert_that(
        not torch.equal(setup.forward(layer=duplicate), run.y),
        f"A write into the parameters of {what} does not change its output.",
    )


@clause("STATE-3")
def test_a_deep_copy_is_a_layer_of_its_own(trial: Trial) -> None:
    def body(case: Case) -> None:
        setup = trial.build(case)
        trial.calls += 1
        assert_copy(trial, setup, copy.deepcopy(setup.layer), "a deep copy")

    trial.check(body, layers(trial))


@clause("STATE-4")
def test_a_pickled_layer_is_the_same_layer(trial: Trial) -> None:
    def body(case: Case) -> None:
        setup = trial.build(case)
        trial.calls += 1
        assert_copy(trial, setup, pickle.loads(pickle.dumps(setup.layer)), "an unpickled layer")

    trial.check(body, layers(trial))


@clause("STATE-5")
def test_train_and_eval_reach_everything(trial: Trial) -> None:
    def body(case: Case) -> None:
        setup = trial.build(case)
        for training in (False, True, False):
            setup.layer.train(training)
            parts = {
                "the layer": setup.layer,
                "base_layer": setup.layer.base_layer,
                **{f"lora_dropout[{n!r}]": m for n, m in setup.layer.lora_dropout.items()},
            }
            for what, module in parts.items():
                trial.assert_that(
                    module.training is training,
                    f"After train({training}), {what} has training = {module.training}.",
                )

    trial.check(
        body, [Case(trial.kind, in_features=8, out_features=5, ranks=(3, 2), dropouts=(0.5, 0.0))]
    )


def evaluate(setup: Setup, mode: AbstractContextManager[Any]) -> None:
    """A forward in eval mode, as a validation step makes it, and back to training."""
    setup.layer.eval()
    with mode:
        setup.forward()
    setup.layer.train()


@clause("STATE-6")
def test_an_evaluation_leaves_no_trace_in_training(trial: Trial) -> None:
    def body(case: Case) -> None:
        never = trial.build(case, repackable=True)
        expected = never.run()
        setup = trial.build(case, repackable=True)
        first = setup.run()
        assert_same_run(trial, "before the evaluation", first, expected)
        evaluate(setup, torch.no_grad())
        assert_same_run(trial, "after an evaluation", setup.run(), expected)

    trial.check(body, layers(trial))


@clause("STATE-7")
def test_an_evaluation_leaves_the_checkpoint_as_it_was(trial: Trial) -> None:
    def body(case: Case) -> None:
        setup = trial.build(case, repackable=True)
        setup.run()
        before = snapshot(setup.layer)
        evaluate(setup, torch.no_grad())
        assert_same_state(trial, "state_dict after an evaluation", snapshot(setup.layer), before)

    wide = [
        Case(trial.kind, d, 128, 64, (4,), (3,), double_quant=q)
        for d in DTYPES
        for q in (False, True)
    ]
    trial.check(body, wide)


@clause("STATE-8")
def test_only_the_active_adapters_are_trainable(trial: Trial) -> None:
    def body(case: Case) -> None:
        setup = trial.build(case)
        trainable = {n for n, p in setup.layer.named_parameters() if p.requires_grad}
        wanted = {f"{part}.{name}" for part in PARAMETERS for name in case.names}
        trial.assert_that(
            trainable == wanted,
            f"Trainable, and should not be: {sorted(trainable - wanted)}; "
            f"frozen, and should not be: {sorted(wanted - trainable)}.",
        )

    trial.check(body, [*layers(trial), *probes(trial.kind)])


@clause("STATE-9")
def test_parameters_are_read_at_each_forward(trial: Trial) -> None:
    def body(case: Case) -> None:
        setup = trial.build(case)
        setup.run()
        setup.forward()
        for part in ("A", "E", "B"):
            for values in setup.data.adapters:
                getattr(values, part)[...] *= -0.5
            setup.install()
            assert_output(trial, setup, f"y after a write into {part}")
        assert_gradients(trial, setup, setup.run())

    trial.check(body, layers(trial))


@clause("STATE-10")
def test_no_random_numbers_without_dropout(trial: Trial) -> None:
    def body(case: Case) -> None:
        setup = trial.build(case)
        before = _generator_state(trial)
        setup.run()
        after = _generator_state(trial)
        trial.assert_that(
            torch.equal(before, after), "A forward without dropout draws random numbers."
        )

    trial.check(
        body,
        [
            Case(trial.kind, dtype, 8, 5, (3,), (3,), dropouts=(p,), training=training)
            for dtype in DTYPES
            for p, training in ((0.0, True), (0.0, False))
        ],
    )
    if trial.only is None:
        trial.check(
            lambda case: _assert_eval_draws_nothing(trial, case),
            [Case(trial.kind, in_features=8, out_features=5, dropouts=(0.5,), training=False)],
        )


def _assert_eval_draws_nothing(trial: Trial, case: Case) -> None:
    setup = trial.build(case)
    before = _generator_state(trial)
    setup.forward()
    trial.assert_that(
        torch.equal(before, _generator_state(trial)), "An eval forward draws random numbers."
    )


def _generator_state(trial: Trial) -> torch.Tensor:
    if trial.device.type == "cuda":
        return torch.cuda.get_rng_state(trial.device)
    return torch.get_rng_state()


@clause("STATE-11")
def test_functional_call_uses_the_parameters_it_is_given(trial: Trial) -> None:
    def body(case: Case) -> None:
        setup = trial.build(case)
        y = setup.forward()
        given = {
            f"{part}.{name}": getattr(setup.layer, part)[name].detach() * scale
            for name in case.names
            for part, scale in zip(PARAMETERS, (2.0, -1.0, 0.5), strict=True)
        }
        trial.calls += 1
        called = torch.func.functional_call(setup.layer, given, (setup.x,))
        trial.assert_same_bits("y after a functional call", setup.forward(), y)
        for values in setup.data.adapters:
            # Powers of two: the same as what the functional call was given, bit for bit.
            values.A[...] *= 2.0
            values.E[...] *= -1.0
            values.B[...] *= 0.5
        setup.install()
        trial.assert_same_bits("y of a functional call", called, setup.forward())
        assert_output(trial, setup)

    trial.check(body, layers(trial))


@clause("STATE-12")
def test_inference_leaves_no_trace_in_training(trial: Trial) -> None:
    def body(case: Case) -> None:
        expected = trial.build(case).run()
        modes = {"no_grad": torch.no_grad, "inference_mode": torch.inference_mode}
        for name, mode in modes.items():
            setup = trial.build(case)
            with mode():
                setup.forward()
            evaluate(setup, mode())
            assert_same_run(trial, f"after a forward under {name}", setup.run(), expected)

    trial.check(body, layers(trial))

"""Chapter STATE: what a layer remembers, saves, copies and shares, and what a call must not change."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from conformance import oracle
from conformance.case import DTYPES, AdapterValues, Case, Data, build_base, exact
from conformance.spec import clause
from conformance.trial import Run, Setup, Trial

PARAMETERS = ("lora_A", "lora_E", "lora_B")
LEARNING_RATE = 0.125
# A CPU with AVX512-BF16 repacks 4-bit weights of these widths, and only of these.
REPACKABLE_IN, REPACKABLE_OUT = 128, 32


def assert_output(trial: Trial, setup: Setup, what: str, y: torch.Tensor | None = None) -> None:
    """y is within the bound, given the output of a twin of the base layer."""
    x, adapters, base = setup.data.x, setup.adapters(), setup.base_output()
    if oracle.in_domain(x, adapters, base, setup.arithmetic):
        expected = oracle.expected_output(x, adapters, base, setup.arithmetic)
        trial.assert_within(what, setup.forward() if y is None else y, expected)


def assert_same_run(trial: Trial, setup: Setup, when: str, got: Run, wanted: Run) -> None:
    """y and every gradient have the bits of another run."""
    trial.assert_same_bits(f"y {when}", got.y, wanted.y)
    assert wanted.dx is not None
    trial.assert_same_bits(f"dx {when}", got.dx, wanted.dx)
    for part, gradients, others in (
        ("dA", got.dA, wanted.dA),
        ("dE", got.dE, wanted.dE),
        ("dB", got.dB, wanted.dB),
    ):
        for name, gradient, other in zip(setup.case.names, gradients, others, strict=True):
            trial.assert_that(other is not None, f"{part} of `{name}` is None in a plain run.")
            assert other is not None
            trial.assert_same_bits(f"{part} of `{name}` {when}", gradient, other)


def assert_same_state(
    trial: Trial, when: str, got: Mapping[str, torch.Tensor], wanted: Mapping[str, torch.Tensor]
) -> None:
    """Two state_dicts have the same keys, dtypes, shapes and bits."""
    trial.assert_that(
        set(got) == set(wanted),
        f"The state_dict {when} has other keys: {sorted(set(got) ^ set(wanted))}.",
    )
    for key, value in wanted.items():
        trial.assert_same_bits(f"state_dict()[{key!r}] {when}", got[key], value, same_dtype=True)


def layers(trial: Trial, *, training: bool = True) -> list[Case]:
    """Small layers in every dtype, with one adapter and with two, whose ranknum is not their rank."""
    return [
        Case(
            trial.kind,
            dtype,
            64,
            5,
            (3,),
            ranks,
            ranknums=ranknums,
            bias=bias,
            double_quant=bias,
            training=training,
        )
        for dtype in DTYPES
        for ranks, ranknums, bias in (((3,), (2.5,), True), ((3, 2), (2.5, 4.0), False))
    ]


@clause("STATE-1")
def test_state_dict_has_pefts_keys(trial: Trial) -> None:
    def body(case: Case) -> None:
        for used in (False, True):
            setup = trial.build(case)
            if used:
                setup.run()
            state = setup.layer.state_dict()
            own = {
                f"{part}.{name}": array
                for name, values, ranknum in zip(
                    case.names, setup.data.adapters, case.ranknums, strict=True
                )
                for part, array in (
                    ("lora_A", values.A),
                    ("lora_E", values.E),
                    ("lora_B", values.B),
                    ("ranknum", np.array([ranknum])),
                )
            }
            twin = build_base(case, setup.data, trial.device).state_dict()
            wanted = set(own) | {f"base_layer.{key}" for key in twin}
            trial.assert_that(
                set(state) == wanted,
                f"state_dict() lacks {sorted(wanted - set(state))} "
                f"and has {sorted(set(state) - wanted)} besides.",
            )
            for key, array in own.items():
                trial.assert_same_bits(
                    f"state_dict()[{key!r}]", state[key], torch.from_numpy(array)
                )

    trial.check(body, layers(trial))


def _saved(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Through a file and back, as a checkpoint goes."""
    file = io.BytesIO()
    torch.save(dict(state), file)
    file.seek(0)
    loaded: dict[str, torch.Tensor] = torch.load(file, weights_only=True)
    return loaded


@clause("STATE-2")
def test_a_loaded_state_dict_gives_the_same_bits(trial: Trial) -> None:
    def body(case: Case) -> None:
        other = replace(case, ranknums=tuple(ranknum + 1.0 for ranknum in case.ranknums))
        for used in (False, True):
            setup = trial.build(case)
            if used:
                setup.run()
            state, wanted = _saved(setup.layer.state_dict()), setup.run()

            # The adapters alone, over a base layer that has its weight already.
            fresh = trial.build(other, data=_other_adapters(setup.data))
            adapters = {k: v for k, v in state.items() if not k.startswith("base_layer.")}
            _load_and_wipe(fresh.layer, adapters, strict=False)
            when = f"after the adapters of a {'used' if used else 'new'} layer were loaded"
            assert_same_run(trial, setup, when, setup.run(layer=fresh.layer), wanted)

            # Everything, over a base layer that has another weight.
            fresh = trial.build(other, data=_other_adapters(_other_base(setup.data, case)))
            _load_and_wipe(fresh.layer, state)
            when = f"after the state_dict of a {'used' if used else 'new'} layer was loaded"
            assert_same_run(trial, setup, when, setup.run(layer=fresh.layer), wanted)

    trial.check(body, layers(trial))


def _load_and_wipe(layer: Any, state: Mapping[str, torch.Tensor], **options: Any) -> None:
    """Load a copy of a state_dict, and overwrite the copy: a layer must not live on its memory."""
    given = copy.deepcopy(dict(state))
    tensors = list(given.values())
    layer.load_state_dict(given, **options)
    for tensor in tensors:
        tensor.zero_()


def _other_adapters(data: Data) -> Data:
    """The same base layer under adapters that have other values."""
    other = tuple(AdapterValues(a.A + 1.0, a.E + 1.0, a.B + 1.0) for a in data.adapters)
    return replace(data, adapters=other)


def _other_base(data: Data, case: Case) -> Data:
    """The same adapters over a base layer that has other values."""
    bias = None if data.bias is None else exact(1.0 - data.bias, case.torch_dtype)
    weight = exact(np.roll(data.weight, 1, axis=1) * -3.0, case.torch_dtype)
    return replace(data, weight=weight, bias=bias)


def _copies_well(trial: Trial, how: str, duplicate: Callable[[Any], Any]) -> None:
    """A duplicate computes the same bits, and neither it nor the original feels the other's changes."""

    def body(case: Case) -> None:
        for used in (False, True):
            setup = trial.build(case)
            if used:
                setup.run()
            trial.calls += 1
            twin = duplicate(setup.layer)
            wanted = setup.run()
            when = f"of {how} of a {'used' if used else 'new'} layer"
            assert_same_run(trial, setup, when, setup.run(layer=twin), wanted)
            trial.assert_that(
                twin.training == case.training
                and sorted(twin.active_adapters) == sorted(setup.layer.active_adapters),
                f"The mode or the active adapters {when} are not the original's.",
            )
            _assert_nothing_shared(trial, setup.layer, twin, when)
            with torch.no_grad():
                for part in PARAMETERS:
                    for parameter in getattr(twin, part).values():
                        parameter.add_(1.0)
            for name in case.names:
                twin.scaling[name] = 11.0
            again = setup.run()
            assert_same_run(trial, setup, f"after a change {when}", again, wanted)

    trial.check(body, [*layers(trial), *layers(trial, training=False)])


def _assert_nothing_shared(trial: Trial, original: Any, twin: Any, when: str) -> None:
    def memory(layer: Any) -> dict[int, str]:
        tensors = [*layer.named_parameters(), *layer.named_buffers()]
        return {tensor.data_ptr(): name for name, tensor in tensors if tensor.numel()}

    mine, others = memory(original), memory(twin)
    shared = sorted(name for address, name in others.items() if address in mine)
    trial.assert_that(not shared, f"The parameters {when} share memory: {shared}.")


@clause("STATE-3")
def test_a_deep_copy_gives_the_same_bits(trial: Trial) -> None:
    _copies_well(trial, "a deep copy", copy.deepcopy)


@clause("STATE-4")
def test_a_pickled_layer_gives_the_same_bits(trial: Trial) -> None:
    # A pickle that this line wrote.
    _copies_well(trial, "a pickled copy", lambda layer: pickle.loads(pickle.dumps(layer)))


@clause("STATE-5")
def test_train_and_eval_reach_the_whole_layer(trial: Trial) -> None:
    def body(case: Case) -> None:
        setup = trial.build(case)
        for mode in (False, True, False):
            trial.calls += 1
            returned = setup.layer.train(mode) if mode else setup.layer.eval()
            call = "train()" if mode else "eval()"
            trial.assert_that(returned is setup.layer, f"{call} does not return the layer.")
            modules = {
                "The layer": setup.layer,
                "The base layer": setup.base,
                **{f"lora_dropout[{n!r}]": setup.layer.lora_dropout[n] for n in case.names},
            }
            for what, module in modules.items():
                trial.assert_that(
                    module.training == mode, f"{what} has training = {module.training} in {call}."
                )
        evaluated = replace(setup, case=replace(case, training=False))
        assert_output(trial, evaluated, "y after eval()")

    trial.check(
        body,
        [
            Case(trial.kind, dtype, 8, 5, (3,), ranks, dropouts=dropouts, base_scale=2.0**-10)
            for dtype in DTYPES
            for ranks, dropouts in (((3,), (0.5,)), ((3, 2), (0.5, 0.0)))
        ],
    )


def _repackable_layers(trial: Trial) -> Iterator[Case]:
    for dtype in DTYPES:
        for number, batch in enumerate(((1,), (17,), (2, 3))):
            yield Case(
                trial.kind,
                dtype,
                REPACKABLE_IN,
                REPACKABLE_OUT,
                batch,
                ranks=(3, 2)[: 1 + number % 2],
                bias=number == 2,
                double_quant=number == 1,
                quant_type="fp4" if number == 2 else "nf4",
                seed=number,
            )


def _step(layer: Any) -> None:
    """One step of gradient descent on what is trained."""
    with torch.no_grad():
        for parameter in layer.parameters():
            if parameter.requires_grad and parameter.grad is not None:
                parameter.sub_(parameter.grad * LEARNING_RATE)


def _evaluate(setup: Setup) -> None:
    """Call the layer in eval mode, as a validation loop does, and go back to training."""
    setup.layer.eval()
    with torch.no_grad():
        setup.forward()
    setup.forward()  # and without no_grad: bitsandbytes looks at x.requires_grad
    setup.layer.train()


def _refuses(trial: Trial, setup: Setup, call: Callable[[], object]) -> bool:
    """Whether a port declines to go on over a repacked base, which is right if it says so."""
    if trial.kind != "4bit":
        call()
        return False
    try:
        call()
    except (RuntimeError, ValueError) as error:
        text = str(error).lower()
        if not any(word in text for word in ("repack", "avx512", "packed")):
            raise
        trial.compared += 1  # a refusal is what this clause may end with
        return True
    return False


@clause("STATE-6")
def test_training_goes_on_after_an_evaluation(trial: Trial) -> None:
    def body(case: Case) -> None:
        setup = trial.build(case, repackable=True)
        never = trial.build(case, repackable=True)
        assert_same_run(trial, setup, "of the first step", setup.run(), never.run())
        for number in (1, 2):
            _step(setup.layer)
            _step(never.layer)
            wanted = never.run()
            if _refuses(trial, setup, lambda: _evaluate(setup)):
                return
            runs: list[Run] = []
            if _refuses(trial, setup, lambda: runs.append(setup.run())):  # noqa: B023
                return
            when = f"of a training step after {number} evaluation{'s' * (number > 1)}"
            assert_same_run(trial, setup, when, runs[0], wanted)
        assert_same_state(
            trial, "after the evaluations", setup.layer.state_dict(), never.layer.state_dict()
        )

    trial.check(body, _repackable_layers(trial))


@clause("STATE-7")
def test_evaluating_leaves_the_state_dict_alone(trial: Trial) -> None:
    def body(case: Case) -> None:
        # Its state_dict is not asked for before: that alone makes bitsandbytes unpack the weight.
        for inputs in dict.fromkeys((case.torch_dtype, torch.bfloat16)):
            setup = trial.build(case, repackable=True)
            never = trial.build(case, repackable=True)
            setup.layer.eval()
            for rows in (setup.x, setup.x, setup.x[:1]):
                x = rows.to(inputs)
                if _refuses(trial, setup, lambda: setup.forward(x)):  # noqa: B023
                    return
            when = f"after evaluations with inputs in {inputs}"
            assert_same_state(trial, when, setup.layer.state_dict(), never.layer.state_dict())

    trial.check(body, _repackable_layers(trial))


@clause("STATE-8")
def test_what_is_trainable(trial: Trial) -> None:
    def body(case: Case) -> None:
        setup = trial.build(case)
        _assert_trainable(trial, setup, case.names, "")
        if len(case.names) > 1:
            for name in reversed(case.names):
                setup.layer.set_adapter(name)
                _assert_trainable(trial, setup, (name,), f" after set_adapter({name!r})")
        setup.layer.eval()
        setup.forward()
        setup.layer.train()
        _assert_trainable(trial, setup, case.names[:1], " after an evaluation")

    trial.check(
        body,
        [
            Case(trial.kind, dtype, 8, 5, (2,), ranks, bias=True)
            for dtype in DTYPES
            for ranks in ((3,), (3, 2), (2, 4, 1))
        ],
    )


def _assert_trainable(trial: Trial, setup: Setup, active: tuple[str, ...], when: str) -> None:
    wanted = {f"{part}.{name}" for part in PARAMETERS for name in active}
    got = {name for name, p in setup.layer.named_parameters() if p.requires_grad}
    trial.assert_that(
        got == wanted,
        f"{sorted(got - wanted)} can be trained and should not, {sorted(wanted - got)} should "
        f"and cannot{when}.",
    )


@clause("STATE-9")
def test_written_values_are_used(trial: Trial) -> None:
    def body(case: Case) -> None:
        setup = trial.build(case)
        name, values = case.names[0], setup.data.adapters[0]
        assert_output(trial, setup, "y before anything is written")
        writes: tuple[tuple[str, np.ndarray], ...] = (
            ("lora_A", values.A),
            ("lora_E", values.E),
            ("lora_B", values.B),
        )
        for number, (part, array) in enumerate(writes * 2):
            array[...] = exact(-1.5 * array, torch.float32)
            parameter = getattr(setup.layer, part)[name]
            # Through `.data` the second time: optimisers do, and no version counter sees it.
            target = parameter.data if number >= len(writes) else parameter
            with torch.no_grad():
                target.copy_(torch.from_numpy(array))
            assert_output(trial, setup, f"y after {part} was written")

    trial.check(
        body,
        [
            Case(trial.kind, dtype, 8, 5, (3,), (3, 2), training=training, base_scale=2.0**-10)
            for dtype in DTYPES
            for training in (True, False)
        ],
    )


@clause("STATE-10")
def test_random_numbers_are_drawn_for_dropout_alone(trial: Trial) -> None:
    def body(case: Case) -> None:
        setup = trial.build(case)
        name, dropped = case.names[0], any(case.dropouts)

        def assert_draws_nothing(when: str) -> None:
            before = _random_state(trial.device)
            setup.run()
            trial.assert_that(
                all(map(torch.equal, _random_state(trial.device), before)),
                f"forward and backward draw random numbers {when}.",
            )

        if not case.training or not dropped:
            assert_draws_nothing("without a dropout" if not dropped else "in eval mode")
            return
        setup.layer.enable_adapters(False)
        assert_draws_nothing("although adapters are disabled")
        setup.layer.enable_adapters(True)
        setup.layer.set_adapter(name)
        assert_draws_nothing("for the dropout of an adapter that is not active")

    trial.check(
        body,
        [
            Case(trial.kind, dtype, 8, 5, (3,), (3, 2), dropouts=dropouts, training=training)
            for dtype in DTYPES
            for training in (True, False)
            for dropouts in ((), (0.0, 0.5))
        ],
    )


def _random_state(device: torch.device) -> list[torch.Tensor]:
    states = [torch.random.get_rng_state()]
    if device.type == "cuda":
        states.append(torch.cuda.get_rng_state(device))
    return states


@clause("STATE-11")
def test_functional_call_uses_the_parameters_it_is_given(trial: Trial) -> None:
    def body(case: Case) -> None:
        setup = trial.build(case)
        kept = copy.deepcopy(setup.run())  # what is not replaced below gathers gradients
        for index, name in enumerate(case.names):
            for part in ("A", "E", "B"):
                given = _given(setup, name, index, part)
                y = setup.forward(
                    layer=lambda x, given=given: torch.func.functional_call(
                        setup.layer, given, (x,)
                    )
                )
                what = f"functional_call with another {part} of `{name}`"
                changed = replace(setup, data=_with(setup.data, index, part))
                assert_output(trial, changed, f"y of {what}", y)
                torch.autograd.backward(y, setup.dout.to(y.dtype))
                for key, tensor in given.items():
                    trial.assert_that(
                        tensor.grad is not None and bool(tensor.grad.any()),
                        f"{key} that was given to functional_call has gradient {tensor.grad}.",
                    )
        assert_same_run(trial, setup, "after functional_call", setup.run(), kept)

    trial.check(
        body,
        [
            Case(trial.kind, dtype, 8, 5, (3,), ranks, base_scale=2.0**-10, training=training)
            for dtype in DTYPES
            for ranks in ((3,), (3, 2))
            for training in (True, False)
        ],
    )


def _with(data: Data, index: int, part: str) -> Data:
    """The data with another A, E or B of one adapter."""
    adapters = list(data.adapters)
    values = exact(getattr(adapters[index], part) * -1.5 + 0.25, torch.float32)
    adapters[index] = replace(adapters[index], **{part: values})
    return replace(data, adapters=tuple(adapters))


def _given(setup: Setup, name: str, index: int, part: str) -> dict[str, torch.Tensor]:
    values = getattr(_with(setup.data, index, part).adapters[index], part)
    tensor = torch.from_numpy(values).to(setup.trial.device, torch.float32)
    return {f"lora_{part}.{name}": tensor.requires_grad_()}


@clause("STATE-12")
def test_training_goes_on_after_a_forward_without_gradients(trial: Trial) -> None:
    contexts: tuple[tuple[str, Callable[[], AbstractContextManager[Any]]], ...] = (
        ("inference_mode", torch.inference_mode),
        ("no_grad", torch.no_grad),
    )

    def body(case: Case) -> None:
        wanted = trial.build(case).run()
        for where, context in contexts:
            for evaluating in (False, True):
                setup = trial.build(case)
                setup.layer.train(not evaluating)
                with context():
                    y = setup.forward(setup.x)
                trial.assert_that(not y.requires_grad, f"y requires a gradient under {where}.")
                setup.layer.train()
                when = f"after a forward under {where} in {'eval' if evaluating else 'train'} mode"
                assert_same_run(trial, setup, when, setup.run(), wanted)

    trial.check(body, layers(trial))

"""Chapter ADPT: several adapters in one layer, which of them are active, and how they are told apart."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import permutations
from typing import Any

import torch
from torch import nn

from conformance import oracle
from conformance.case import DTYPES, AdapterValues, Case, build_base
from conformance.spec import clause
from conformance.strategies import cases, probes
from conformance.trial import Setup, Trial
from conformance.values import draw

PARAMETERS = ("lora_A", "lora_E", "lora_B")
# Each name is a part of another one, or of an attribute's name.
NESTED_NAMES = (("a", "ab", "lora_A"), ("default", "fault", "default_2"))


def assert_sum(
    trial: Trial, setup: Setup, active: Sequence[str], what: str, y: torch.Tensor | None = None
) -> None:
    """y is within the bound of the base output plus the updates of these adapters, and no others."""
    index = {name: i for i, name in enumerate(setup.case.names)}
    adapters = [setup.adapters()[index[name]] for name in active]
    x, base = setup.data.x, setup.base_output()
    if oracle.in_domain(x, adapters, base, setup.arithmetic):
        expected = oracle.expected_output(x, adapters, base, setup.arithmetic)
        trial.assert_within(what, setup.forward() if y is None else y, expected)


def assert_no_gradient(trial: Trial, what: str, gradient: torch.Tensor | None) -> None:
    """None, or zeros for those who fill them in."""
    trial.assert_that(
        gradient is None or not bool(gradient.any()), f"{what} is {gradient}, expected none."
    )


def assert_trainable(trial: Trial, setup: Setup, wanted: Sequence[str], when: str) -> None:
    """A, E and B of these adapters require a gradient, and no other adapter's."""
    for name in setup.case.names:
        for part in PARAMETERS:
            got = getattr(setup.layer, part)[name].requires_grad
            trial.assert_that(
                got == (name in wanted), f"{part}[{name!r}].requires_grad is {got} {when}."
            )


def state_of(layer: Any) -> dict[str, Any]:
    """What there is to know of a layer's adapters: plain values, and copies of its parameters."""
    parameters = {
        f"{part}[{name!r}]": (value.detach().clone(), value.requires_grad)
        for part in (*PARAMETERS, "ranknum")
        for name, value in getattr(layer, part).items()
    }
    settings = {
        f"{part}[{name!r}]": value
        for part in ("scaling", "r", "lora_alpha")
        for name, value in getattr(layer, part).items()
    }
    dropouts = {
        f"lora_dropout[{name!r}]": getattr(module, "p", 0.0)
        for name, module in layer.lora_dropout.items()
    }
    return {**parameters, **settings, **dropouts}


def assert_unchanged(
    trial: Trial, when: str, after: Mapping[str, Any], before: Mapping[str, Any]
) -> None:
    """Everything that `before` has is in `after` as it was; other entries are not looked at."""
    for key, old in before.items():
        trial.assert_that(key in after, f"{key} is gone {when}.")
        if not isinstance(old, tuple):
            trial.assert_that(
                after[key] == old, f"{key} is {after[key]!r} {when}, it was {old!r} before."
            )
            continue
        value, trainable = after[key]
        trial.assert_same_bits(f"{key} {when}", value, old[0], same_dtype=True)
        trial.assert_that(
            trainable == old[1],
            f"{key}.requires_grad is {trainable} {when}, it was {old[1]} before.",
        )


def assert_nothing_added(
    trial: Trial, when: str, after: Mapping[str, Any], before: Mapping[str, Any]
) -> None:
    trial.assert_that(
        set(after) <= set(before),
        f"There are leftovers {when}: {sorted(set(after) - set(before))}.",
    )


@clause("ADPT-1")
def test_active_adapters_add_up(trial: Trial) -> None:
    def body(case: Case) -> None:
        setup = trial.build(case)
        assert_sum(trial, setup, case.names, "y")

    trial.search(
        cases(trial.kind, adapters=3, training=None, batches=((1,), (2,), (5,), (2, 3))),
        body,
        [*probes(trial.kind, adapters=2), *probes(trial.kind, adapters=3, training=False)],
        cost=2,
    )


@clause("ADPT-2")
def test_each_adapter_sees_x_as_it_was_given(trial: Trial) -> None:
    def body(case: Case) -> None:
        setup = trial.build(case)
        for order in permutations(case.names):
            setup.layer.set_adapter(list(order))
            assert_sum(trial, setup, order, f"y in the order {', '.join(order)}")
        # Silent, and with a dropout: if its x were used further on, most of x would be gone.
        setup = trial.build(replace(case, dropouts=(0.5, *[0.0] * (len(case.ranks) - 1))))
        setup.data.adapters[0].E[...] = 0.0
        setup.install()
        what = "y after an adapter that has a dropout and E = 0"
        assert_sum(trial, setup, case.names[1:], what)
        _after_a_half_precision_adapter(trial, case)

    trial.check(
        body,
        [
            Case(trial.kind, dtype, n, 5, (3,), ranks, base_scale=2.0**-10)
            for dtype in DTYPES
            for n, ranks in ((8, (3, 2)), (17, (2, 4, 1)))
        ],
    )


def _after_a_half_precision_adapter(trial: Trial, case: Case) -> None:
    """The first adapter went through `.to(torch.bfloat16)`, the second came later, in fp32.

    The first is silent, and whatever a port casts for it must not be what the second one computes
    from. A port that cannot run such a layer fails DTYPE-3, and is not blamed twice.
    """
    pair = replace(case, ranks=case.ranks[:2])
    setup = trial.build(replace(pair, ranks=pair.ranks[:1]), data=draw(pair), values=False)
    setup.layer.to(torch.bfloat16)
    try:
        setup.forward()
    except Exception:
        return
    setup = replace(setup, case=pair)
    setup.add_adapter(pair.names[1], 1)
    setup.layer.set_adapter(list(pair.names))
    setup.data.adapters[0].E[...] = 0.0
    setup.install()
    what = "y after an adapter in bfloat16 that has E = 0"
    assert_sum(trial, setup, pair.names[1:], what)


@clause("ADPT-3")
def test_inactive_adapters_are_silent(trial: Trial) -> None:
    def body(case: Case) -> None:
        setup = trial.build(case)
        for index, name in enumerate(case.names):
            setup.layer.set_adapter(name)
            # Frozen or not: who does not contribute receives nothing.
            for part in PARAMETERS:
                for parameter in getattr(setup.layer, part).values():
                    parameter.requires_grad_()
            run = setup.run()
            assert_sum(trial, setup, [name], f"y with only `{name}` active", run.y)
            base = setup.base_run()
            adapters = [setup.adapters()[index]]
            if oracle.in_domain(setup.data.x, adapters, base.y, setup.arithmetic):
                expected = oracle.expected_gradients(
                    setup.data.x, adapters, setup.data.dout, base.dx, setup.arithmetic
                )
                trial.assert_within(f"dx with only `{name}` active", run.dx, expected.dx)
            for other, idle in enumerate(case.names):
                if idle != name:
                    for part, got in (("A", run.dA), ("E", run.dE), ("B", run.dB)):
                        assert_no_gradient(trial, f"d{part} of the inactive `{idle}`", got[other])

    trial.check(
        body,
        [
            Case(trial.kind, dtype, 8, 5, (3,), ranks, base_scale=2.0**-10)
            for dtype in DTYPES
            for ranks in ((3, 2), (2, 4, 1))
        ],
    )


@clause("ADPT-4")
def test_adapters_can_be_switched_off_and_on(trial: Trial) -> None:
    def body(case: Case) -> None:
        setup = trial.build(case)
        before = setup.run()
        trial.assert_that(
            not torch.equal(before.y, setup.base_output()),
            "y equals the base output while adapters are enabled.",
        )

        setup.layer.enable_adapters(False)
        trial.assert_that(
            setup.layer.disable_adapters is True,
            f"disable_adapters is {setup.layer.disable_adapters!r} after enable_adapters(False).",
        )
        off, base = setup.run(), setup.base_run()
        trial.assert_same_bits("y with adapters disabled", off.y, base.y)
        assert base.dx is not None
        trial.assert_same_bits("dx with adapters disabled", off.dx, base.dx)
        for part, gradients in (("A", off.dA), ("E", off.dE), ("B", off.dB)):
            for name, gradient in zip(case.names, gradients, strict=True):
                assert_no_gradient(trial, f"d{part} of the disabled `{name}`", gradient)
        y = setup.forward(setup.x)  # one that nothing is asked to differentiate
        trial.assert_same_bits("y with adapters disabled", y, setup.base_output())

        setup.layer.enable_adapters(True)
        trial.assert_that(
            setup.layer.disable_adapters is False,
            f"disable_adapters is {setup.layer.disable_adapters!r} after enable_adapters(True).",
        )
        again = setup.run()
        trial.assert_same_bits("y with adapters enabled again", again.y, before.y)
        for part, after, earlier in (
            ("A", again.dA, before.dA),
            ("E", again.dE, before.dE),
            ("B", again.dB, before.dB),
        ):
            for name, got, wanted in zip(case.names, after, earlier, strict=True):
                if wanted is not None:
                    what = f"d{part} of `{name}`, enabled again"
                    trial.assert_same_bits(what, got, wanted)

    trial.check(
        body,
        [
            Case(trial.kind, dtype, 8, 5, (3,), ranks, training=training, bias=True)
            for dtype in DTYPES
            for ranks in ((3,), (3, 2))
            for training in (True, False)
        ],
    )


@clause("ADPT-5")
def test_set_adapter_switches(trial: Trial) -> None:
    def body(case: Case) -> None:
        setup = trial.build(case)
        first, second, third = case.names
        switches: list[str | list[str]] = [
            first,
            second,
            [third],
            [first, second],
            [third, first],
            [first, second, third],
            second,
        ]
        for names in switches:
            setup.layer.set_adapter(names)
            wanted = [names] if isinstance(names, str) else names
            got = setup.layer.active_adapters
            trial.assert_that(
                isinstance(got, (list, tuple)) and sorted(got) == sorted(wanted),
                f"active_adapters is {got!r} after set_adapter({names!r}).",
            )
            assert_sum(trial, setup, wanted, f"y after set_adapter({names!r})")

    trial.check(
        body,
        [
            Case(trial.kind, dtype, 8, 5, (3,), (2, 4, 1), training=training, base_scale=2.0**-10)
            for dtype in DTYPES
            for training in (True, False)
        ],
    )


@clause("ADPT-6")
def test_an_unknown_name_is_refused(trial: Trial) -> None:
    def body(case: Case) -> None:
        setup = trial.build(case)
        layer, known = setup.layer, case.names[0]
        layer.set_adapter(known)
        y, before, active = setup.forward(), state_of(layer), list(layer.active_adapters)
        # A part of a known name, a longer one, and unknown names beside known ones.
        for names in (
            "unknown",
            known[:-1],
            known + "_",
            [case.names[1], "unknown"],
            ["unknown", known],
        ):
            trial.assert_refuses(
                f"set_adapter({names!r})",
                lambda names=names: layer.set_adapter(names),  # type: ignore[misc]
                ValueError,
                KeyError,
            )
            when = f"after set_adapter({names!r}) was refused"
            assert_unchanged(trial, when, state_of(layer), before)
            trial.assert_that(
                list(layer.active_adapters) == active,
                f"active_adapters is {layer.active_adapters} {when}, it was {active} before.",
            )
            trial.assert_same_bits(f"y {when}", setup.forward(), y)

    trial.check(body, [Case(trial.kind, dtype, 8, 5, (3,), (3, 2)) for dtype in DTYPES])


@clause("ADPT-7")
def test_a_bad_name_is_refused(trial: Trial) -> None:
    errors = (TypeError, ValueError, KeyError)

    def body(case: Case) -> None:
        for name in ("", "a.b", "."):
            data = draw(case)
            base = build_base(case, data, trial.device)
            fresh = build_base(case, data, trial.device).state_dict()
            trial.assert_refuses(
                f"A new layer with an adapter named {name!r}",
                lambda base=base, name=name: trial.construct(base, name, r=2),  # type: ignore[misc]
                *errors,
            )
            for key, value in base.state_dict().items():
                what = f"base_layer.{key} after the name {name!r} was refused"
                trial.assert_same_bits(what, value, fresh[key], same_dtype=True)
        setup = trial.build(case)
        y, before = setup.forward(), state_of(setup.layer)
        for name in ("", "a.b", ".", *case.names):
            trial.assert_refuses(
                f"update_layer with the name {name!r}",
                lambda name=name: setup.layer.update_layer(name, 4, 2),  # type: ignore[misc]
                *errors,
            )
            when, after = f"after the name {name!r} was refused", state_of(setup.layer)
            assert_unchanged(trial, when, after, before)
            assert_nothing_added(trial, when, after, before)
            trial.assert_same_bits(f"y {when}", setup.forward(), y)

    trial.check(body, [Case(trial.kind, "float32", 8, 5, (3,), ranks) for ranks in ((3,), (3, 2))])


@clause("ADPT-8")
def test_attributes_have_pefts_names_and_types(trial: Trial) -> None:
    def body(case: Case) -> None:
        setup = trial.build(case)
        layer, names = setup.layer, list(case.names)
        containers: dict[str, type] = dict.fromkeys((*PARAMETERS, "ranknum"), nn.ParameterDict)
        containers |= {"lora_dropout": nn.ModuleDict}
        containers |= dict.fromkeys(("scaling", "r", "lora_alpha"), dict)
        for attribute, kind in containers.items():
            value = getattr(layer, attribute, None)
            trial.assert_that(
                isinstance(value, kind),
                f"`{attribute}` is a {type(value).__name__}, expected a {kind.__name__}.",
            )
            trial.assert_that(
                sorted(value.keys()) == sorted(names),  # type: ignore[union-attr]
                f"`{attribute}` has the keys {list(value.keys())}, expected {names}.",  # type: ignore[union-attr]
            )
        _assert_entries(trial, setup)
        trial.assert_that(
            layer.base_layer is setup.base, "`base_layer` is not the layer that was given."
        )
        active = layer.active_adapters
        trial.assert_that(
            isinstance(active, (list, tuple)) and list(active) == names,
            f"`active_adapters` is {active!r}, expected {names}.",
        )
        for flag in ("disable_adapters", "merged"):
            value = getattr(layer, flag, None)
            trial.assert_that(value is False, f"`{flag}` is {value!r}, expected False.")

    trial.check(
        body,
        [
            Case(trial.kind, "float32", 8, 5, (2,), ranks, dropouts=dropouts)
            for ranks, dropouts in (((3,), ()), ((3, 2), (0.25, 0.0)), ((0, 4, 1), ()))
        ],
    )


def _assert_entries(trial: Trial, setup: Setup) -> None:
    """Each adapter's parameters have PEFT's shapes, and its settings are those that were given."""
    case, layer = setup.case, setup.layer
    n, m = case.in_features, case.out_features
    for index, name in enumerate(case.names):
        rank, alpha = case.ranks[index], case.alpha(index)
        shapes = {"lora_A": (rank, n), "lora_E": (rank, 1), "lora_B": (m, rank), "ranknum": (1,)}
        for attribute, shape in shapes.items():
            value = getattr(layer, attribute)[name]
            trial.assert_that(
                isinstance(value, nn.Parameter) and tuple(value.shape) == shape,
                f"`{attribute}[{name!r}]` is a {type(value).__name__} of shape "
                f"{tuple(value.shape)}, expected a Parameter of shape {shape}.",
            )
        trial.assert_that(
            isinstance(layer.lora_dropout[name], nn.Module),
            f"`lora_dropout[{name!r}]` is no module.",
        )
        for attribute, wanted in (
            ("r", rank),
            ("lora_alpha", alpha),
            ("scaling", alpha if alpha > 0 else float(rank)),
        ):
            got = getattr(layer, attribute)[name]
            trial.assert_that(
                not isinstance(got, torch.Tensor) and got == wanted,
                f"`{attribute}[{name!r}]` is {got!r}, expected the number {wanted}.",
            )


@clause("ADPT-9")
def test_names_inside_names_are_independent(trial: Trial) -> None:
    def body(case: Case) -> None:
        for names in NESTED_NAMES:
            setup, values = _with_names(trial, case, names)
            for index, name in enumerate(names):
                for part, array in zip(PARAMETERS, _arrays(values[index]), strict=True):
                    what = f"{part}[{name!r}] after the others were written"
                    trial.assert_same_bits(what, getattr(setup.layer, part)[name], array)
            for index, name in enumerate(names):
                setup.layer.set_adapter(name)
                _assert_alone(trial, setup, names, index)

    trial.check(
        body,
        [
            Case(trial.kind, dtype, 8, 5, (3,), ranks, base_scale=2.0**-10)
            for dtype in ("float32", "bfloat16")
            # Unlike ranks show a mixed product at once; like ranks let a mix-up of shapes through.
            for ranks in ((3, 2, 4), (3, 3, 3))
        ],
    )


def _with_names(
    trial: Trial, case: Case, names: Sequence[str]
) -> tuple[Setup, tuple[AdapterValues, ...]]:
    """A layer whose adapters have these names instead of the case's own."""
    data = draw(case)
    base = build_base(case, data, trial.device)
    layer: Any = trial.construct(base, names[0], r=case.ranks[0], lora_alpha=case.alpha(0))
    for index, name in enumerate(names[1:], start=1):
        layer.update_layer(name, case.ranks[index], case.alpha(index))
    layer.train(case.training)
    setup = Setup(trial, case, data, base, layer)
    with torch.no_grad():
        for name, values in zip(names, data.adapters, strict=True):
            for part, array in zip(PARAMETERS, _arrays(values), strict=True):
                getattr(layer, part)[name].copy_(array)
    return setup, data.adapters


def _arrays(values: AdapterValues) -> tuple[torch.Tensor, ...]:
    """A, E and B, in the order of `PARAMETERS`."""
    return tuple(torch.from_numpy(v) for v in (values.A, values.E, values.B))


def _assert_alone(trial: Trial, setup: Setup, names: Sequence[str], index: int) -> None:
    """Only this adapter contributes, and only it receives gradients."""
    layer, name = setup.layer, names[index]
    for parameter in layer.parameters():
        parameter.grad = None
    y = setup.forward(setup.x.requires_grad_())
    adapters, base = [setup.adapters()[index]], setup.base_output()
    expected = oracle.expected_output(setup.data.x, adapters, base, setup.arithmetic)
    trial.assert_within(f"y with `{name}` of {names} active", y, expected)
    torch.autograd.backward(y, setup.dout.to(y.dtype))
    for other in names:
        for part in PARAMETERS:
            gradient = getattr(layer, part)[other].grad
            what = f"the gradient of {part}[{other!r}] with `{name}` active"
            if other == name:
                trial.assert_that(
                    gradient is not None and bool(gradient.any()), f"{what} is {gradient}."
                )
            else:
                assert_no_gradient(trial, what, gradient)


@clause("ADPT-10")
def test_a_further_adapter_leaves_the_others_alone(trial: Trial) -> None:
    def body(case: Case) -> None:
        alone = replace(case, ranks=case.ranks[:1], dropouts=case.dropouts[:1])
        setup = trial.build(alone, data=replace(draw(case), adapters=draw(case).adapters[:1]))
        name = case.names[0]
        with torch.no_grad():
            setup.layer.ranknum[name].fill_(2.5)  # what starts at r must not be started again
        y, before = setup.forward(), state_of(setup.layer)
        setup = replace(setup, case=case, data=draw(case))
        for index, new in enumerate(case.names[1:], start=1):
            setup.add_adapter(new, index)
            when = f"after `{new}` was added"
            assert_unchanged(trial, when, state_of(setup.layer), before)
            if case.dropout(0) == 0.0 or not case.training:
                trial.assert_same_bits(f"y {when}", setup.forward(), y)
        setup.layer.set_adapter(list(case.names))
        if not any(case.dropouts):
            complete = replace(case, ranknums=(2.5, *map(float, case.ranks[1:])))
            setup = replace(setup, case=complete)
            setup.install()
            assert_sum(trial, setup, case.names, "y of the old and the new adapters")

    trial.check(
        body,
        [
            Case(trial.kind, dtype, 8, 5, (3,), ranks, dropouts=dropouts)
            for dtype in DTYPES
            for ranks, dropouts in (((3, 2), ()), ((2, 0, 4), ()), ((3, 2), (0.25, 0.5)))
        ],
    )


@clause("ADPT-11")
def test_set_adapter_chooses_what_is_trained(trial: Trial) -> None:
    def body(case: Case) -> None:
        setup = trial.build(case)
        first, second, third = case.names
        switches: list[str | list[str]] = [first, second, [third], [first, third], second]
        for names in switches:
            setup.layer.set_adapter(names)
            wanted = [names] if isinstance(names, str) else names
            trial.calls += 1
            assert_trainable(trial, setup, wanted, f"after set_adapter({names!r})")

    trial.check(body, [Case(trial.kind, "float32", 8, 5, (2,), (2, 4, 1))])


@clause("ADPT-12")
def test_a_further_adapter_takes_the_layers_mode(trial: Trial) -> None:
    def body(case: Case) -> None:
        complete = draw(case)
        alone = replace(case, ranks=case.ranks[:1], dropouts=case.dropouts[:1])
        setup = trial.build(alone, data=replace(complete, adapters=complete.adapters[:1]))
        setup = replace(setup, case=case, data=complete)
        for index, new in enumerate(case.names[1:], start=1):
            setup.add_adapter(new, index)
        setup.layer.set_adapter(list(case.names))
        setup.install()
        assert_sum(trial, setup, case.names, "y of a layer in eval mode that got another adapter")

    trial.check(
        body,
        [
            Case(trial.kind, dtype, 64, 5, (3,), (3, 2), dropouts=(0.0, 0.5), training=False)
            for dtype in DTYPES
        ],
    )


@clause("ADPT-13")
def test_enabling_chooses_what_is_trained(trial: Trial) -> None:
    def body(case: Case) -> None:
        setup = trial.build(case)
        for active in ([case.names[1]], [case.names[2], case.names[0]]):
            setup.layer.set_adapter(active)
            for enabled in (False, True, True):
                setup.layer.enable_adapters(enabled)
                trial.calls += 1
                when = f"after enable_adapters({enabled}) with {active} active"
                assert_trainable(trial, setup, active if enabled else [], when)

    trial.check(body, [Case(trial.kind, "float32", 8, 5, (2,), (2, 4, 1))])

"""Chapter INIT: what a new adapter is, and which layers and numbers a constructor refuses."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn

from conformance import oracle
from conformance.case import DTYPES, Case, as_float64, build_base
from conformance.devices import seed_generators
from conformance.spec import clause
from conformance.strategies import cases, probes
from conformance.trial import Setup, Trial
from conformance.values import draw

DEVIATION = 0.02
# A conforming port fails a statistical clause, for one of the two layers, with less than this chance...
FALSE_ALARM = 1e-9
# ... although it may make as many tests of its draws as this: each test gets an equal share.
MAX_TESTS = 200


# --- chance -------------------------------------------------------------------------------------


def assert_chance(trial: Trial, what: str, seen: str, surprise: float) -> None:
    """`surprise`, of which a test shows P(surprise > t) <= 2 exp(-t) for honest draws, is small.

    With t = ln(2 MAX_TESTS / FALSE_ALARM) a false alarm has a chance of at most
    FALSE_ALARM / MAX_TESTS. NaN is a surprise.
    """
    trial.assert_that(
        surprise <= math.log(2.0 * MAX_TESTS / FALSE_ALARM),
        f"{what} is {seen}. Draws from N(0, {DEVIATION}) do this once in e^{surprise:.0f} runs.",
    )


def assert_standard_normal(trial: Trial, what: str, z: float) -> None:
    """Chernoff: P(|Z| > z) <= 2 exp(-z^2 / 2)."""
    assert_chance(trial, what, f"{z:+.3g} standard deviations off", 0.5 * z * z)


def assert_normal(trial: Trial, what: str, values: np.ndarray) -> None:
    """n values are independent draws from N(0, DEVIATION): mean, deviation, shape.

    The mean of n is N(0, 1 / n). The sum of squares is chi-squared, with
    P(S / n beyond t) <= exp(-n/2 (t - 1 - ln t)) on either side of 1 (Chernoff). How many lie
    below a cut is binomial: P(K / n beyond s) <= exp(-n KL(s || q)).
    """
    z, n = values.ravel() / DEVIATION, values.size
    square = float((z * z).mean())
    deviation = DEVIATION * math.sqrt(square)
    ratio = math.log(square) if square > 0 else -math.inf
    surprise = 0.5 * n * (square - 1.0 - ratio)
    assert_chance(trial, f"the deviation of {what}", f"{deviation:.4g}", surprise)
    assert_standard_normal(trial, f"the mean of {what}", float(z.mean() * math.sqrt(n)))
    for cut in range(-3, 4):
        below, q = int((z < cut).sum()), 0.5 * math.erfc(-cut / math.sqrt(2.0))
        shares = ((below / n, q), (1.0 - below / n, 1.0 - q))
        divergence = sum(s * math.log(s / p) for s, p in shares if s > 0)
        share = f"the share of {what} below {cut} deviations"
        assert_chance(trial, share, f"{below / n:.4g}, not {q:.4g}", n * divergence)


def assert_uncorrelated(trial: Trial, what: str, a: np.ndarray, b: np.ndarray) -> None:
    """Given a, the sum of a * b is N(0, DEVIATION |a|) if b is drawn independently of it."""
    size = float(np.linalg.norm(a))
    trial.assert_that(size > 0, f"{what}: all values are zero.")
    assert_standard_normal(
        trial, f"the correlation of {what}", float((a * b).sum() / DEVIATION / size)
    )


# --- clauses ------------------------------------------------------------------------------------


@clause("INIT-1")
def test_a_new_adapter_changes_nothing(trial: Trial) -> None:
    def body(case: Case) -> None:
        setup = trial.build(case, values=False)
        trial.assert_same_bits("y of a new adapter", setup.forward(), setup.base_output())
        if len(case.ranks) == 2 and not any(case.dropouts):
            _assert_nothing_beside_another(trial, setup)

    sharp = [
        replace(probe, training=training, dropouts=dropouts, alphas=(64.0, 64.0))
        for training, dropouts in ((True, (0.0, 0.5)), (True, ()), (False, (0.5, 0.0)))
        for probe in probes(trial.kind, adapters=2)
    ]
    batches = ((2,), (17,), (2, 3))
    trial.search(cases(trial.kind, training=None, adapters=2, batches=batches), body, sharp, cost=4)


def _assert_nothing_beside_another(trial: Trial, setup: Setup) -> None:
    """The first adapter gets its values, the second stays new: y is the first one's."""
    name, values = setup.case.names[0], setup.data.adapters[0]
    with torch.no_grad():
        setup.layer.lora_A[name].copy_(torch.from_numpy(values.A))
        setup.layer.lora_E[name].copy_(torch.from_numpy(values.E))
        setup.layer.lora_B[name].copy_(torch.from_numpy(values.B))
    x, first, base = setup.data.x, setup.adapters()[:1], setup.base_output()
    if oracle.in_domain(x, first, base, setup.arithmetic):
        expected = oracle.expected_output(x, first, base, setup.arithmetic)
        trial.assert_within("y with a new adapter beside another", setup.forward(), expected)


@clause("INIT-2")
def test_shapes_dtypes_device_and_singular_values(trial: Trial) -> None:
    def body(case: Case) -> None:
        setup = trial.build(case, values=False)
        for name, r in zip(case.names, case.ranks, strict=True):
            wanted = {
                "lora_A": (r, case.in_features),
                "lora_E": (r, 1),
                "lora_B": (case.out_features, r),
            }
            for attribute, shape in wanted.items():
                parameter = getattr(setup.layer, attribute)[name]
                what = f"{attribute}[{name!r}]"
                for fact, got, expected in (
                    ("shape", tuple(parameter.shape), shape),
                    ("dtype", parameter.dtype, torch.float32),
                    ("device", parameter.device, setup.base.weight.device),
                ):
                    trial.assert_that(
                        got == expected, f"{what} has {fact} {got}, expected {expected}."
                    )
            E = setup.layer.lora_E[name].detach()
            trial.assert_same_bits(f"lora_E[{name!r}]", E, torch.zeros_like(E))

    trial.check(
        body,
        [
            Case(trial.kind, dtype, n, m, (1,), ranks, compute_dtype=compute, alphas=(1.0, 1.0))
            for dtype in DTYPES
            for compute in ((None, "bfloat16", "float16") if trial.kind == "4bit" else (None,))
            for n, m, ranks in ((8, 5, (3, 12)), (3, 65, (1, 0)), (64, 2, (0, 2)))
        ],
    )


@clause("INIT-3")
def test_a_and_b_are_normal(trial: Trial) -> None:
    def body(case: Case) -> None:
        setup = trial.build(case, values=False)
        for name in case.names:
            assert_normal(trial, f"lora_A[{name!r}]", as_float64(setup.layer.lora_A[name]))
            assert_normal(trial, f"lora_B[{name!r}]", as_float64(setup.layer.lora_B[name]))

    # Some 20,000 numbers a matrix; in, out and r differ, and none of them may enter the deviation.
    trial.check(
        body,
        [
            Case(trial.kind, dtype, 192, 130, (1,), (128, 144), alphas=(16.0, 1.0), seed=seed)
            for seed, dtype in enumerate(DTYPES)
        ],
    )


@clause("INIT-4")
def test_draws_are_independent_and_seeded(trial: Trial) -> None:
    def body(case: Case) -> None:
        first = _drawn(trial.build(case, values=False))
        # build() seeds torch's generator; a layer made now draws on.
        base = build_base(case, draw(case), trial.device)
        layer = trial.construct(base, case.names[0], r=case.ranks[0])
        second = Setup(trial, replace(case, ranks=case.ranks[:1]), draw(case), base, layer)
        drawn = first | _drawn(second, " of a second layer")
        matrices = list(drawn.items())
        for index, (one, a) in enumerate(matrices):
            for what, half, other in (
                ("even and odd rows", a[::2], a[1::2]),
                ("upper and lower half", a[: len(a) // 2], a[len(a) // 2 :]),
                ("even and odd columns", a[:, ::2], a[:, 1::2]),
                ("left and right half", a[:, : a.shape[1] // 2], a[:, a.shape[1] // 2 :]),
            ):
                assert_uncorrelated(trial, f"{what} of {one}", half, other)
            for two, b in matrices[index + 1 :]:
                assert_uncorrelated(trial, f"{one} and {two}", a, b)
                assert_uncorrelated(trial, f"{one} and {two} transposed", a, b.T)

        again = _drawn(trial.build(case, values=False))
        other_seed = _drawn(trial.build(replace(case, seed=case.seed + 1), values=False))
        for what, values in first.items():
            trial.assert_that(
                bool((values == again[what]).all()),
                f"{what} differs between two layers that were made after the same torch.manual_seed.",
            )
            trial.assert_that(
                bool((values != other_seed[what]).any()),
                f"{what} is the same after another torch.manual_seed.",
            )

    # Square, so that every two of the matrices can be laid on one another.
    trial.check(body, [Case(trial.kind, DTYPES[0], 64, 64, (1,), (64, 64), alphas=(1.0, 1.0))])


def _drawn(setup: Setup, of: str = "") -> dict[str, np.ndarray]:
    """Every matrix that was drawn, by what a message calls it."""
    return {
        f"{attribute}[{name!r}]{of}": as_float64(getattr(setup.layer, attribute)[name])
        for name in setup.case.names
        for attribute in ("lora_A", "lora_B")
    }


def _bits(base: nn.Module) -> dict[str, torch.Tensor]:
    """Copies of the base layer's tensors, quantisation state included."""
    return {
        key: value.detach().clone()
        for key, value in base.state_dict().items()
        if isinstance(value, torch.Tensor)
    }


def _assert_bits(trial: Trial, base: nn.Module, before: dict[str, torch.Tensor], when: str) -> None:
    after = _bits(base)
    trial.assert_that(
        set(after) == set(before),
        f"The base layer's state changed {when}: {sorted(set(after) ^ set(before))}.",
    )
    for key, value in before.items():
        trial.assert_same_bits(f"base_layer.{key} {when}", after[key], value, same_dtype=True)


@clause("INIT-5")
def test_the_base_layer_is_kept_and_frozen(trial: Trial) -> None:
    def body(case: Case) -> None:
        data = draw(case)
        base: Any = build_base(case, data, trial.device)
        if case.kind == "4bit" and case.in_features == 64:
            base = _with_trainable_storage(case, trial.device)
        before, weight = _bits(base), base.weight
        layer: Any = trial.build(case, base=base, data=data).layer
        trial.assert_that(layer.base_layer is base, "`base_layer` is not the layer that was given.")
        trial.assert_that(base.weight is weight, "The base layer's weight was replaced.")
        _assert_bits(trial, base, before, "when it was wrapped")
        layer.enable_adapters(False)
        layer.enable_adapters(True)
        layer.set_adapter(case.names[0])
        trial.assert_that(
            not base.weight.requires_grad, "The base layer's weight requires a gradient."
        )
        for name, parameter in base.named_parameters():
            trial.assert_that(
                not parameter.requires_grad, f"The base layer's {name} was frozen and is not now."
            )

    trial.check(
        body,
        [
            *(replace(probe, bias=True) for probe in probes(trial.kind, adapters=2)),
            Case(trial.kind, in_features=64, out_features=32),
        ],
    )


def _with_trainable_storage(case: Case, device: torch.device) -> nn.Module:
    """A 4-bit layer whose packed weight is stored as fp32, so that it can, wrongly, be trained."""
    from bitsandbytes.nn import Linear4bit

    base: nn.Module = Linear4bit(
        case.in_features,
        case.out_features,
        bias=False,
        compute_dtype=case.torch_dtype,
        quant_storage=torch.float32,
    )
    moved: nn.Module = base.to(device)
    moved.get_parameter("weight").requires_grad_(True)
    return moved


@clause("INIT-6")
def test_a_negative_rank_is_refused(trial: Trial) -> None:
    def body(case: Case) -> None:
        data = draw(case)
        for r in (-1, -8):
            base = build_base(case, data, trial.device)
            trial.assert_refuses(f"r = {r}", partial(trial.construct, base, r=r), ValueError)
            layer: Any = trial.build(case, data=data).layer
            update = partial(layer.update_layer, "new", r, 1)
            trial.assert_refuses(f"update_layer with r = {r}", update, ValueError)
            for attribute in ("lora_A", "lora_B", "lora_E", "ranknum", "scaling", "r"):
                trial.assert_that(
                    "new" not in getattr(layer, attribute),
                    f"update_layer with r = {r} is refused and leaves an entry in `{attribute}`.",
                )

    trial.check(body, [Case(trial.kind, dtype, 8, 5) for dtype in DTYPES])


def _refuses_each(trial: Trial, argument: str, values: tuple[Any, ...]) -> None:
    """The constructor and `update_layer` take none of the values."""

    def body(case: Case) -> None:
        for value in values:
            arguments = {"r": 3, "lora_alpha": 3, argument: value}
            base = build_base(case, draw(case), trial.device)
            wrong = (TypeError, ValueError)
            call = partial(trial.construct, base, **arguments)
            trial.assert_refuses(f"{argument} = {value!r}", call, *wrong)
            layer: Any = trial.build(case).layer
            update = partial(layer.update_layer, "new", **arguments)
            trial.assert_refuses(f"update_layer with {argument} = {value!r}", update, *wrong)

    trial.check(body, [Case(trial.kind, in_features=8, out_features=5)])


@clause("INIT-7")
def test_a_rank_that_is_no_integer_is_refused(trial: Trial) -> None:
    _refuses_each(trial, "r", (2.5, "8", True))


@clause("INIT-8")
def test_a_dropout_rate_out_of_range_is_refused(trial: Trial) -> None:
    _refuses_each(trial, "lora_dropout", (1.5, -0.1, 1.0, math.nan, math.inf))


@clause("INIT-9")
def test_another_kind_of_base_layer_is_refused(trial: Trial) -> None:
    def body(case: Case) -> None:
        other = replace(case, kind="8bit" if case.kind == "4bit" else "4bit")
        shape = (case.in_features, case.out_features)
        bases: tuple[nn.Module, ...] = (
            nn.Linear(*shape, dtype=case.torch_dtype, device=trial.device),
            build_base(other, draw(other), trial.device),
        )
        for base in bases:
            kind = f"{type(base).__module__}.{type(base).__name__}"
            trial.assert_refuses(
                f"a {kind} as base layer",
                partial(trial.construct, base, r=3, lora_alpha=3),
                TypeError,
                ValueError,
            )

    trial.check(body, [Case(trial.kind, dtype, 8, 5) for dtype in DTYPES])


@clause("INIT-10")
def test_a_refusal_leaves_the_base_layer_alone(trial: Trial) -> None:
    def body(case: Case) -> None:
        data = draw(case)
        bad: tuple[dict[str, Any], ...] = ({"r": -1}, {"r": 3, "lora_dropout": 1.5}, {"r": "8"})
        for arguments in bad:
            base = build_base(case, data, trial.device)
            twin = build_base(case, data, trial.device)
            _assert_untouched(trial, base, twin, case, arguments)
        seed_generators(case.seed, trial.device)
        dense, twin = (nn.Linear(case.in_features, case.out_features) for _ in range(2))
        twin.load_state_dict(dense.state_dict())
        _assert_untouched(trial, dense.to(trial.device), twin.to(trial.device), case, {"r": 3})

    trial.check(body, [Case(trial.kind, "float32", 8, 5, (2,), bias=True)])


def _assert_untouched(
    trial: Trial, base: nn.Module, twin: nn.Module, case: Case, arguments: dict[str, Any]
) -> None:
    """Whatever a refused construction was given, it gives back; an accepted one is not judged."""
    if base.bias is not None:
        base.bias.requires_grad_(True)
    weight, training = base.weight, base.training
    flags = {name: p.requires_grad for name, p in base.named_parameters()}
    before = _bits(base)
    when = f"when a {type(base).__name__} was refused with {arguments}"
    try:
        trial.construct(base, **arguments)
    except Exception:
        trial.assert_that(base.weight is weight, f"The base layer's weight was replaced {when}.")
        trial.assert_that(base.training == training, f"The base layer's mode changed {when}.")
        after = {name: p.requires_grad for name, p in base.named_parameters()}
        trial.assert_that(after == flags, f"`requires_grad` went from {flags} to {after} {when}.")
        _assert_bits(trial, base, before, when)
        x = torch.ones(2, case.in_features, dtype=case.torch_dtype, device=trial.device)
        trial.assert_same_bits(f"base(x) {when}", base(x), twin(x))
    else:
        trial.assert_that(arguments["r"] != -1, "r = -1 is accepted: there is no refusal to judge.")


@clause("INIT-11")
def test_other_initial_weights_are_not_the_identity(trial: Trial) -> None:
    def body(case: Case) -> None:
        data = draw(case)
        base = build_base(case, data, trial.device)
        seed_generators(case.seed, trial.device)
        arguments = {"lora_alpha": 3, "lora_dropout": 0.0, "init_lora_weights": False}
        layer: Any = trial.construct(base, case.names[0], r=3, **arguments)
        setup = Setup(trial, case, data, base, layer)
        layer.update_layer("new", 3, **arguments)
        for name in (case.names[0], "new"):
            layer.set_adapter(name)
            trial.assert_that(
                bool((as_float64(setup.forward()) != as_float64(setup.base_output())).any()),
                f"Adapter `{name}`, made with init_lora_weights=False, leaves y = base(x).",
            )

    trial.check(body, [Case(trial.kind, dtype, 8, 5, (2,), (3,)) for dtype in DTYPES])


@clause("INIT-12")
def test_arguments_that_are_left_out(trial: Trial) -> None:
    def body(case: Case) -> None:
        data, name = draw(case), case.names[0]
        bare: Any = trial.construct(build_base(case, data, trial.device), name)
        got = bare.r[name]
        trial.assert_that(got == 0, f"r[{name!r}] is {got} where r was left out, expected 0.")
        base = build_base(case, data, trial.device)
        setup = Setup(trial, case, data, base, trial.construct(base, name, r=case.ranks[0]))
        for layer, given in ((bare, "nothing"), (setup.layer, "r alone")):
            for what in ("lora_alpha", "scaling"):
                got = getattr(layer, what)[name]
                wanted = case.alpha(0)
                trial.assert_that(
                    got == wanted, f"{what}[{name!r}] is {got} where {given} was given, expected 1."
                )
            y = setup.forward(layer=layer.train())
            trial.assert_same_bits(f"y where {given} was given", y, setup.base_output())
        setup.install()
        x, adapters, output = setup.data.x, setup.adapters(), setup.base_output()
        expected = oracle.expected_output(x, adapters, output, setup.arithmetic)
        trial.assert_within("y in train mode where r alone was given", setup.forward(), expected)

    trial.check(
        body, [Case(trial.kind, dtype, 8, 5, (2,), (3,), alphas=(1.0,)) for dtype in DTYPES]
    )

"""Chapter GRAD: what flows back to x, A, E and B, through either base layer, and what must not."""

from __future__ import annotations

from collections.abc import Callable
from itertools import combinations
from typing import Literal

import numpy as np
import torch
from torch.utils.checkpoint import checkpoint

from conformance import oracle
from conformance.case import DTYPES, Case, as_float64
from conformance.real import real_cases
from conformance.spec import clause
from conformance.strategies import cases, dyadic_cases, probes
from conformance.trial import Run, Setup, Trial

Part = Literal["dx", "dA", "dE", "dB"]
PARTS: tuple[Part, ...] = ("dx", "dA", "dE", "dB")


def assert_gradients(
    trial: Trial,
    setup: Setup,
    run: Run,
    parts: tuple[Part, ...] = PARTS,
    *,
    x: np.ndarray | None = None,
    dout: np.ndarray | None = None,
    when: str = "",
) -> None:
    """The gradients of a run are within their bounds, given the base layer's own gradient of x."""
    x = setup.data.x if x is None else x
    dout = setup.data.dout if dout is None else dout
    base = setup.base_run(setup.tensor(x), setup.tensor(dout))
    adapters = setup.adapters()
    if not (
        oracle.in_domain(x, adapters, base.y, setup.arithmetic)
        and oracle.gradients_in_domain(x, adapters, dout, base.dx, setup.arithmetic)
    ):
        return
    expected = oracle.expected_gradients(x, adapters, dout, base.dx, setup.arithmetic)
    if "dx" in parts:
        trial.assert_within(f"dx{when}", run.dx, expected.dx)
    for part, got, wanted in (
        ("dA", run.dA, expected.dA),
        ("dE", run.dE, expected.dE),
        ("dB", run.dB, expected.dB),
    ):
        if part in parts:
            for name, gradient, bounded in zip(setup.case.names, got, wanted, strict=True):
                trial.assert_within(f"{part} of `{name}`{when}", gradient, bounded)


def _gradient_search(trial: Trial, part: Part) -> None:
    def body(case: Case) -> None:
        setup = trial.build(case)
        assert_gradients(trial, setup, setup.run(), (part,))

    trial.search(cases(trial.kind, adapters=2), body, probes(trial.kind), cost=2)


@clause("GRAD-1")
def test_gradient_of_x(trial: Trial) -> None:
    _gradient_search(trial, "dx")


@clause("GRAD-2")
def test_gradient_of_a(trial: Trial) -> None:
    _gradient_search(trial, "dA")


@clause("GRAD-3")
def test_gradient_of_e(trial: Trial) -> None:
    _gradient_search(trial, "dE")


@clause("GRAD-4")
def test_gradient_of_b(trial: Trial) -> None:
    _gradient_search(trial, "dB")


@clause("GRAD-5")
def test_dyadic_gradients_are_exact(trial: Trial) -> None:
    def body(case: Case) -> None:
        setup = trial.build(case)
        run, base = setup.run(), setup.base_run()
        exact = oracle.exact_gradients(
            setup.data.x, setup.adapters()[0], setup.data.dout, base.dx, case.torch_dtype
        )
        got = {"dx": run.dx, "dA": run.dA[0], "dE": run.dE[0], "dB": run.dB[0]}
        for part, expected in exact.items():
            trial.assert_same_bits(part, got[part], expected.to(trial.device))

    trial.check(body, dyadic_cases(trial.kind))


@clause("GRAD-6")
def test_a_new_adapter_learns_through_e(trial: Trial) -> None:
    def body(case: Case) -> None:
        setup = trial.build(case, values=False)
        run = setup.run()
        for index, name in enumerate(case.names):
            for part, gradient in (("A", run.dA[index]), ("B", run.dB[index])):
                trial.assert_that(
                    gradient is not None, f"{part} of a new `{name}` has no gradient."
                )
                assert gradient is not None
                trial.assert_same_bits(
                    f"d{part} of a new `{name}`", gradient, torch.zeros_like(gradient)
                )
            dE = run.dE[index]
            trial.assert_that(
                dE is not None and bool((dE != 0).all()),
                f"dE of a new `{name}` is {None if dE is None else dE.flatten().tolist()}; "
                "only E can start to learn.",
            )

    trial.check(
        body,
        [
            Case(trial.kind, dtype, 17, 5, (4,), ranks)
            for dtype in DTYPES
            for ranks in ((3,), (3, 2))
        ],
    )


@clause("GRAD-7")
def test_without_singular_values_dx_is_the_base_layers(trial: Trial) -> None:
    def body(case: Case) -> None:
        setup = trial.build(case)
        for values in setup.data.adapters:
            values.E[...] = 0.0
        setup.install()
        base = setup.base_run()
        assert base.dx is not None
        trial.assert_same_bits("dx with E = 0", setup.run().dx, base.dx)

    trial.check(body, [*probes(trial.kind), *probes(trial.kind, adapters=2)])


@clause("GRAD-8")
def test_base_weight_and_ranknum_are_frozen(trial: Trial) -> None:
    def body(case: Case) -> None:
        setup = trial.build(case)
        setup.run()
        frozen = {"base_layer.weight": setup.base.weight, **dict(setup.layer.ranknum.items())}
        for name, parameter in frozen.items():
            trial.assert_that(not parameter.requires_grad, f"`{name}` requires a gradient.")
            trial.assert_that(parameter.grad is None, f"`{name}` received a gradient.")

    trial.check(body, probes(trial.kind, adapters=2))


@clause("GRAD-9")
def test_gradients_accumulate(trial: Trial) -> None:
    def body(case: Case) -> None:
        setup = trial.build(case)
        once = setup.run()
        x = setup.x.requires_grad_()
        for parameter in setup.layer.parameters():
            parameter.grad = None
        for _ in range(2):
            torch.autograd.backward(setup.forward(x), setup.dout)
        name = case.names[0]
        for what, got, single in (
            ("dx", x.grad, once.dx),
            ("dA", setup.layer.lora_A[name].grad, once.dA[0]),
            ("dE", setup.layer.lora_E[name].grad, once.dE[0]),
            ("dB", setup.layer.lora_B[name].grad, once.dB[0]),
        ):
            assert single is not None
            # g + g is exact in binary floating point.
            trial.assert_same_bits(f"{what} after two backward passes", got, single + single)

    trial.check(body, probes(trial.kind))


def _checkpointed(
    layer: torch.nn.Module, reentrant: bool
) -> Callable[[torch.Tensor], torch.Tensor]:
    def forward(x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = checkpoint(layer, x, use_reentrant=reentrant)
        return y

    return forward


def assert_same_run(trial: Trial, what: str, got: Run, expected: Run) -> None:
    """Output and gradients have the same bits."""
    trial.assert_same_bits(f"y {what}", got.y, expected.y)
    for part in PARTS:
        observed, wanted = getattr(got, part), getattr(expected, part)
        if part == "dx":
            observed, wanted = (observed,), (wanted,)
        for one, other in zip(observed, wanted, strict=True):
            trial.assert_that(other is not None, f"{part} of the plain run is None.")
            trial.assert_same_bits(f"{part} {what}", one, other)


@clause("GRAD-10")
def test_checkpointing_changes_no_bit(trial: Trial) -> None:
    def body(case: Case) -> None:
        setup = trial.build(case)
        plain = setup.run()
        for reentrant in (True, False):
            what = f"under checkpointing (use_reentrant={reentrant})"
            run = setup.run(forward=_checkpointed(setup.layer, reentrant))
            assert_same_run(trial, what, run, plain)
        assert_gradients(trial, setup, plain)

    trial.check(body, probes(trial.kind, adapters=2))


@clause("GRAD-11")
def test_layout_of_the_incoming_gradient(trial: Trial) -> None:
    def body(case: Case) -> None:
        setup = trial.build(case)
        dout = setup.dout
        layouts = {
            "transposed": dout.transpose(0, -1).contiguous().transpose(0, -1),
            "expanded row": dout[:1].expand(dout.shape),
            "expanded scalar": dout.flatten()[0].expand(dout.shape),
        }
        for layout, view in layouts.items():
            run = setup.run(dout=view)
            of = f" with a {layout} incoming gradient"
            assert_gradients(trial, setup, run, dout=as_float64(view), when=of)

    trial.check(body, probes(trial.kind))


@clause("GRAD-12")
def test_parameter_gradients_are_fp32(trial: Trial) -> None:
    def body(case: Case) -> None:
        setup = trial.build(case)
        run = setup.run()
        shapes = {
            "A": (run.dA[0], (case.ranks[0], case.in_features)),
            "E": (run.dE[0], (case.ranks[0], 1)),
            "B": (run.dB[0], (case.out_features, case.ranks[0])),
        }
        for name, (gradient, shape) in shapes.items():
            trial.assert_that(gradient is not None, f"d{name} is None.")
            assert gradient is not None
            trial.assert_that(
                gradient.dtype == torch.float32, f"d{name} is {gradient.dtype}, not fp32."
            )
            trial.assert_that(
                tuple(gradient.shape) == shape, f"d{name} has shape {tuple(gradient.shape)}."
            )

    trial.check(body, probes(trial.kind))


@clause("GRAD-13")
def test_an_input_without_gradient(trial: Trial) -> None:
    def body(case: Case) -> None:
        setup = trial.build(case)
        torch.autograd.backward(setup.forward(setup.x), setup.dout)
        layer = setup.layer
        grads = (
            tuple(p[name].grad for name in case.names)
            for p in (layer.lora_A, layer.lora_E, layer.lora_B)
        )
        assert_gradients(trial, setup, Run(setup.dout, None, *grads), ("dA", "dE", "dB"))
        with torch.no_grad():
            y = setup.forward()
        trial.assert_that(not y.requires_grad, "y requires a gradient under no_grad.")

    trial.check(body, probes(trial.kind, adapters=2))


@clause("GRAD-14")
def test_writing_into_y_in_place(trial: Trial) -> None:
    def body(case: Case) -> None:
        setup = trial.build(case)

        def doubled(x: torch.Tensor) -> torch.Tensor:
            y: torch.Tensor = setup.layer(x)
            y += 1.0
            y *= 2.0
            return y

        run = setup.run(forward=doubled)
        assert_gradients(trial, setup, run, dout=2.0 * setup.data.dout)

    trial.check(body, [*probes(trial.kind), *probes(trial.kind, adapters=2)])


@clause("GRAD-15")
def test_a_masked_rank_still_learns_through_e(trial: Trial) -> None:
    def body(case: Case) -> None:
        setup = trial.build(case)
        values = setup.data.adapters[0]
        masked = np.arange(case.ranks[0]) % 2 == 0
        values.E[masked] = 0.0
        setup.install()
        run = setup.run()
        assert run.dA[0] is not None
        assert run.dB[0] is not None
        rows, columns = run.dA[0][torch.from_numpy(masked)], run.dB[0][:, torch.from_numpy(masked)]
        trial.assert_same_bits("dA of masked ranks", rows, torch.zeros_like(rows))
        trial.assert_same_bits("dB of masked ranks", columns, torch.zeros_like(columns))
        assert_gradients(trial, setup, run)

    trial.search(
        cases(trial.kind, values=("gaussian",), ranks=(3, 2, 4, 8)),
        body,
        [
            *(c for c in probes(trial.kind) if c.values != "onehot"),
            # So many rows and ranks that a layer may leave the masked ones out.
            *(Case(trial.kind, d, 64, 33, (65,), (12,), base_scale=2.0**-10) for d in DTYPES),
        ],
        cost=4,
    )


@clause("GRAD-16")
def test_adjoint_identity_on_dyadic_data(trial: Trial) -> None:
    def body(case: Case) -> None:
        setup = trial.build(case)
        run = setup.run()
        rng = np.random.default_rng(case.seed)
        name, dout = case.names[0], setup.data.dout
        before = as_float64(setup.forward())
        directions = {
            "A": (setup.layer.lora_A[name], run.dA[0]),
            "E": (setup.layer.lora_E[name], run.dE[0]),
            "B": (setup.layer.lora_B[name], run.dB[0]),
        }
        for part, (parameter, gradient) in directions.items():
            trial.assert_that(gradient is not None, f"d{part} is None.")
            assert gradient is not None
            step = rng.choice([-1.0, 0.0, 1.0], tuple(parameter.shape))
            with torch.no_grad():
                parameter.add_(torch.from_numpy(step).to(parameter))
            change = float((dout * (as_float64(setup.forward()) - before)).sum())
            setup.install()
            _assert_adjoint(trial, part, change, float((as_float64(gradient) * step).sum()))
        if case.kind == "4bit" or trial.device.type == "cpu":  # where the base layer is linear in x
            step = rng.choice([-1.0, 0.0, 1.0], setup.data.x.shape)
            y = as_float64(setup.forward(setup.tensor(setup.data.x + step)))
            assert run.dx is not None
            change = float((dout * (y - before)).sum())
            _assert_adjoint(trial, "x", change, float((as_float64(run.dx) * step).sum()))

    trial.check(body, dyadic_cases(trial.kind, dtypes=("float32",)))


def _assert_adjoint(trial: Trial, part: str, change: float, product: float) -> None:
    trial.assert_that(
        change == product,
        f"<G, y({part} + V) - y({part})> is {change}, <d{part}, V> is {product}: on dyadic data "
        "they are equal, so backward is not the adjoint of forward.",
    )


@clause("GRAD-17")
def test_a_second_backward_through_the_same_graph(trial: Trial) -> None:
    def body(case: Case) -> None:
        setup = trial.build(case)
        x = setup.x.requires_grad_()
        name = case.names[0]
        leaves = [
            x,
            *(p[name] for p in (setup.layer.lora_A, setup.layer.lora_E, setup.layer.lora_B)),
        ]
        y = setup.forward(x)
        first = torch.autograd.grad(y, leaves, setup.dout, retain_graph=True)
        second = torch.autograd.grad(y, leaves, setup.dout)
        for part, one, two in zip(PARTS, first, second, strict=True):
            trial.assert_same_bits(f"{part} of the second backward", two, one)

    trial.check(body, probes(trial.kind))


@clause("GRAD-18")
def test_an_empty_batch_gives_zero_gradients(trial: Trial) -> None:
    def body(case: Case) -> None:
        setup = trial.build(case)
        run = setup.run()
        for part, gradients in (("dA", run.dA), ("dE", run.dE), ("dB", run.dB)):
            gradient = gradients[0]
            trial.assert_that(gradient is not None, f"{part} of an empty batch is None.")
            assert gradient is not None
            trial.assert_same_bits(
                f"{part} of an empty batch", gradient, torch.zeros_like(gradient)
            )
        trial.assert_same_bits("dx of an empty batch", run.dx, setup.x)

    trial.check(
        body, [Case(trial.kind, d, 8, 5, batch, (3,)) for d in DTYPES for batch in ((0,), (2, 0))]
    )


@clause("GRAD-19")
def test_real_weights_and_activations(trial: Trial) -> None:
    trial.require(trial.profile.real_model or trial.only is not None, "profile quick has no model")

    def body(case: Case) -> None:
        setup = trial.build(case)
        assert_gradients(trial, setup, setup.run())

    trial.check(body, real_cases(trial.kind))


@clause("GRAD-26")
def test_frozen_parameters(trial: Trial) -> None:
    parts: dict[str, Part] = {"lora_A": "dA", "lora_E": "dE", "lora_B": "dB"}

    def body(case: Case) -> None:
        for frozen in (*combinations(parts, 1), *combinations(parts, 2)):
            setup = trial.build(case)
            for part in frozen:
                for name in case.names:
                    getattr(setup.layer, part)[name].requires_grad_(False)
            run = setup.run()
            for part in frozen:
                for name, gradient in zip(case.names, getattr(run, parts[part]), strict=True):
                    trial.assert_that(gradient is None, f"{part}[{name!r}] is frozen, and learns.")
            trained = tuple(d for part, d in parts.items() if part not in frozen)
            assert_gradients(trial, setup, run, ("dx", *trained))

    trial.check(body, [Case(trial.kind, dtype, 8, 5, (3,), (3, 2)) for dtype in DTYPES])

"""Chapter GRAD, continued: odd sizes, eval mode, what is not finite, and what happens around a backward."""

from __future__ import annotations

import math

import numpy as np
import torch

from conformance import oracle
from conformance.case import DTYPES, Case
from conformance.spec import clause
from conformance.strategies import dyadic_cases, probes
from conformance.test_gradients import assert_gradients
from conformance.trial import Run, Setup, Trial


@clause("GRAD-20")
def test_what_is_not_finite_shows_in_its_place(trial: Trial) -> None:
    def body(case: Case) -> None:
        setup = trial.build(case)
        adapters = setup.adapters()
        for poison in (math.nan, math.inf):
            for row in (0, len(setup.data.x) - 1):
                dout = setup.dout
                dout[row, 0] = poison
                run, base = setup.run(dout=dout), setup.base_run(dout=dout)
                assert run.dx is not None
                assert base.dx is not None
                clean = [i for i in range(len(dout)) if i != row]
                expected = oracle.expected_gradients(
                    setup.data.x[clean],
                    adapters,
                    setup.data.dout[clean],
                    base.dx[clean],
                    setup.arithmetic,
                )
                where = f"where a row of the incoming gradient has {poison}"
                trial.assert_within(f"dx of the other rows {where}", run.dx[clean], expected.dx)
                gradients = {"dx": run.dx, "dA": run.dA[0], "dE": run.dE[0], "dB": run.dB[0]}
                for part, gradient in gradients.items():
                    trial.assert_that(
                        gradient is not None and not bool(torch.isfinite(gradient).all()),
                        f"{part} is finite {where}: who scales losses would step on it.",
                    )

    trial.check(
        body, [Case(trial.kind, dtype, 8, 5, (n,), (3,)) for dtype in DTYPES for n in (2, 7)]
    )


@clause("GRAD-21")
def test_a_second_derivative_is_right_or_refused(trial: Trial) -> None:
    """dP is linear in each of the other factors Q, so that its derivative is a difference.

    <dP(Q + U) - dP(Q), V> = <d<dP, V>/dQ, U>, and on dyadic data both sides are exact.
    """

    def body(case: Case) -> None:
        setup = trial.build(case)
        factors = _factors(setup)
        rng = np.random.default_rng(case.seed)
        steps = {
            part: setup.tensor(rng.choice([-1.0, 0.0, 1.0], tuple(factor.shape)))
            for part, factor in factors.items()
        }
        for part in ("A", "E", "B"):
            try:
                first = _along(setup, factors, part, steps[part], create_graph=True)
                others = {p: f for p, f in factors.items() if p != part}
                second = torch.autograd.grad(first, list(others.values()), allow_unused=True)
            except RuntimeError:
                trial.assert_that(True, "refused")
                return
            for (other, factor), derivative in zip(others.items(), second, strict=True):
                with torch.no_grad():
                    factor.add_(steps[other])
                change = float((_along(setup, factors, part, steps[part]) - first).detach())
                with torch.no_grad():
                    factor.sub_(steps[other])
                got = 0.0 if derivative is None else float((derivative * steps[other]).sum())
                trial.assert_that(
                    got == change,
                    f"The derivative of <d{part}, V> along a step of {other} is {got}, but <d{part}, V> "
                    f"changes by {change}: a second derivative is silently wrong.",
                )

    trial.check(body, dyadic_cases(trial.kind, dtypes=("float32",)))


def _factors(setup: Setup) -> dict[str, torch.Tensor]:
    name, layer = setup.case.names[0], setup.layer
    return {
        "x": setup.x.requires_grad_(),
        "A": layer.lora_A[name],
        "E": layer.lora_E[name],
        "B": layer.lora_B[name],
    }


def _along(
    setup: Setup,
    factors: dict[str, torch.Tensor],
    part: str,
    step: torch.Tensor,
    *,
    create_graph: bool = False,
) -> torch.Tensor:
    """<dP, V>: the gradient of one factor along a step."""
    y = setup.forward(factors["x"])
    (gradient,) = torch.autograd.grad(y, factors[part], setup.dout, create_graph=create_graph)
    return (gradient * step).sum()


@clause("GRAD-22")
def test_gradients_of_odd_sizes(trial: Trial) -> None:
    def body(case: Case) -> None:
        setup = trial.build(case)
        assert_gradients(trial, setup, setup.run())

    rows = [(8, 4, 3, (n,)) for n in (17, 33, 65, 129)]
    ragged = [
        (n, m, r, (3,))
        for n, m, r in ((5, 4, 1), (3, 5, 8), (5, 2, 3), (17, 33, 17), (63, 65, 5), (65, 63, 70))
    ]
    trial.check(
        body,
        [
            Case(trial.kind, dtype, n, m, batch, (r,), base_scale=2.0**-10, seed=number)
            for dtype in DTYPES
            for number, (n, m, r, batch) in enumerate([*rows, *ragged])
        ],
    )


@clause("GRAD-23")
def test_gradients_in_eval_mode(trial: Trial) -> None:
    def body(case: Case) -> None:
        setup = trial.build(case)
        assert_gradients(trial, setup, setup.run())

    trial.check(
        body,
        [*probes(trial.kind, training=False), *probes(trial.kind, training=False, adapters=2)],
    )


@clause("GRAD-24")
def test_writing_into_x_after_the_forward(trial: Trial) -> None:
    def body(case: Case) -> None:
        setup = trial.build(case)
        x = setup.x.requires_grad_()
        y = setup.forward(x)
        with torch.no_grad():
            x.mul_(-3.0).add_(1.0)
        try:
            torch.autograd.backward(y, setup.dout.to(y.dtype))
        except RuntimeError:
            trial.assert_that(True, "torch noticed the write, and refused")
            return
        layer, names = setup.layer, case.names
        gradients = (
            tuple(parameters[name].grad for name in names)
            for parameters in (layer.lora_A, layer.lora_E, layer.lora_B)
        )
        assert_gradients(trial, setup, Run(y.detach(), x.grad, *gradients))

    trial.check(body, probes(trial.kind))


@clause("GRAD-25")
def test_an_incoming_gradient_beyond_half_precision(trial: Trial) -> None:
    def body(case: Case) -> None:
        setup = trial.build(case)
        setup.data.dout[...] *= 2.0**20
        assert_gradients(trial, setup, setup.run())

    wide = probes(trial.kind, dtypes=("float32", "bfloat16"), adapters=2)
    trial.check(body, wide)

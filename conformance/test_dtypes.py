"""Chapter DTYPE: which dtype comes out, what it may cost in accuracy, and what must stay in range."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from conformance import oracle
from conformance.case import (
    DTYPES,
    TORCH_DTYPES,
    AdapterValues,
    Case,
    Data,
    DType,
    as_float64,
    exact,
)
from conformance.spec import clause
from conformance.strategies import probes
from conformance.trial import Setup, Trial
from conformance.values import draw

HALVES: tuple[DType, ...] = ("bfloat16", "float16")
PARAMETERS = ("lora_A", "lora_E", "lora_B", "ranknum")
# Every way in which users convert a model, and the dtype that they get.
CONVERSIONS: tuple[tuple[str, DType, Callable[[Any], Any]], ...] = (
    (".half()", "float16", lambda layer: layer.half()),
    (".to(torch.bfloat16)", "bfloat16", lambda layer: layer.to(torch.bfloat16)),
    (".to(torch.float16)", "float16", lambda layer: layer.to(torch.float16)),
    (".bfloat16()", "bfloat16", lambda layer: layer.bfloat16()),
)
# The least power of two next to which a half-precision sum loses a 1: 8 and 11 significant bits.
LOSES_ONE = {"bfloat16": 2.0**8, "float16": 2.0**11}
ONES = 6
# ranknum = fl32(2 - 1e-5) and alpha = 1: c is 1/2, and no conforming order of evaluation rounds.
ALPHA, RANKNUM_POWER = 1.0, 1


@clause("DTYPE-1")
def test_y_has_the_base_outputs_dtype(trial: Trial) -> None:
    def body(case: Case) -> None:
        setup = trial.build(case)
        wanted = setup.base_output().dtype
        for what, y in (
            ("y", setup.forward()),
            ("y of an x that requires a gradient", setup.forward(setup.x.requires_grad_())),
        ):
            trial.assert_that(
                y.dtype == wanted,
                f"{what} is {y.dtype} for an x of {case.torch_dtype}; the base layer returns {wanted}.",
            )

    plain = [
        case
        for training in (True, False)
        for adapters in (1, 2)
        for case in probes(trial.kind, training=training, adapters=adapters)
    ]
    pruned = [replace(case, ranks=(0,)) for case in plain[:12]]
    dropped = [replace(case, dropouts=(0.5,)) for case in plain[:12]]
    trial.check(body, [*plain, *pruned, *dropped, *_tall(trial)])


def _tall(trial: Trial) -> list[Case]:
    """Numbers of rows at which implementations change from one way of multiplying to another."""
    return [
        Case(trial.kind, dtype, 8, 5, (rows,), (3,))
        for dtype in DTYPES
        for rows in (17, 33, 65, 129)
    ]


@clause("DTYPE-2")
def test_autocast(trial: Trial) -> None:
    def body(case: Case) -> None:
        for autocast in HALVES:
            setup = trial.build(case)
            x = setup.data.x
            # Exact in every dtype that is about, so that no cast of x itself is a rounding.
            x[...] = exact(x, TORCH_DTYPES[autocast])
            x[...] = exact(x, case.torch_dtype)

            def under_autocast(call: Callable[[], torch.Tensor], to: DType) -> torch.Tensor:
                with torch.autocast(trial.device.type, dtype=TORCH_DTYPES[to]):
                    return call()

            base = under_autocast(setup.base_output, autocast)
            run = setup.run(
                forward=lambda x, to=autocast, layer=setup.layer: under_autocast(  # type: ignore[misc]
                    lambda: layer(x), to
                )
            )
            trial.assert_that(
                run.y.dtype == base.dtype,
                f"y is {run.y.dtype} for an x of {case.torch_dtype} under autocast to {autocast}; "
                f"the base layer returns {base.dtype} there.",
            )
            for part, gradients in (("A", run.dA), ("E", run.dE), ("B", run.dB)):
                trial.assert_that(
                    all(g is not None for g in gradients),
                    f"{part} receives no gradient after a forward under autocast to {autocast}.",
                )
            if case.dtype in ("float32", autocast):
                _assert_autocast_output(trial, setup, run.y, base, autocast)

    trial.check(
        body,
        [case for adapters in (1, 2) for case in probes(trial.kind, adapters=adapters)]
        + [Case(trial.kind, dtype, 8, 5, (3,), (3,), training=False) for dtype in DTYPES],
    )


def _assert_autocast_output(
    trial: Trial, setup: Setup, y: torch.Tensor, base: torch.Tensor, autocast: DType
) -> None:
    """The adapter path may compute in the autocast dtype, and y is stored in the base output's."""
    stored: DType = next(name for name, dtype in TORCH_DTYPES.items() if dtype == base.dtype)
    arithmetic = oracle.arithmetic_for(trial.port, stored, trial.device, compute=autocast)
    x, adapters = setup.data.x, setup.adapters()
    if oracle.in_domain(x, adapters, base, arithmetic):
        expected = oracle.expected_output(x, adapters, base, arithmetic)
        trial.assert_within(f"y under autocast to {autocast}", y, expected)


@clause("DTYPE-3")
def test_a_converted_layer_runs(trial: Trial) -> None:
    def body(case: Case) -> None:
        for how, dtype, convert in CONVERSIONS:
            if dtype != case.dtype:
                continue
            for used in (False, True):
                setup = trial.build(case, data=_representable(draw(case), case.torch_dtype))
                if used:
                    setup.forward()
                convert(setup.layer)
                _assert_converted(trial, setup, f"after {how}{' of a used layer' if used else ''}")

    trial.check(
        body,
        [
            Case(trial.kind, dtype, 8, 5, batch, ranks, bias=bias, training=training)
            for dtype in HALVES
            for training in (True, False)
            for batch, ranks, bias in (((3,), (3,), True), ((2, 2), (2, 4), False))
        ],
    )


def _representable(data: Data, dtype: torch.dtype) -> Data:
    """A, E and B rounded to a half-precision dtype, which a conversion then leaves as they are."""
    adapters = tuple(
        AdapterValues(*(exact(v, dtype) for v in (a.A, a.E, a.B))) for a in data.adapters
    )
    return replace(data, adapters=adapters)


def _assert_converted(trial: Trial, setup: Setup, when: str) -> None:
    """y and dx are within the bound; the parameters, and so the arithmetic, may be half."""
    case = setup.case
    arithmetic = oracle.arithmetic_for(trial.port, case.dtype, trial.device, compute=case.dtype)
    x, adapters, base = setup.data.x, setup.adapters(), setup.base_run()
    run = setup.run()
    trial.assert_within(f"y {when}", run.y, oracle.expected_output(x, adapters, base.y, arithmetic))
    expected = oracle.expected_gradients(x, adapters, setup.data.dout, base.dx, arithmetic)
    trial.assert_within(f"dx {when}", run.dx, expected.dx)


@clause("DTYPE-4")
def test_fp16_stays_in_range(trial: Trial) -> None:
    def body(case: Case) -> None:
        for what, data in _nearly_overflowing(case):
            setup = trial.build(case, data=data)
            setup.install()
            adapters = setup.adapters()
            base = setup.base_output()
            expected = oracle.expected_output(data.x, adapters, base, setup.arithmetic)
            y = setup.forward()
            trial.assert_that(
                bool(torch.isfinite(y).all()),
                f"y is {as_float64(y).ravel()[:2].tolist()} where {what}, although the true y is "
                f"only {expected.value.ravel()[:2].tolist()}: divide before the cast to fp16.",
            )
            trial.assert_within(f"y where {what}", y, expected)

    trial.check(
        body,
        [
            Case(
                trial.kind,
                "float16",
                in_features=64,
                out_features=4,
                batch=(rows,),
                ranks=(16,),
                alphas=(alpha,),
                base_scale=2.0**-10,
                training=training,
            )
            for alpha, rows in ((1.0, 2), (16.0, 2), (1.0, 65))
            for training in (True, False)
        ],
    )


def _nearly_overflowing(case: Case) -> Iterator[tuple[str, Data]]:
    """Adapters whose update is in the range of fp16, and whose numerator is not.

    x @ (A * E).T is at most 256 and every element of A, B and of their products with E, alpha and
    1 / ranknum at most 1024, so only a port that divides last can leave the range of fp16, 65504.
    """
    n, m, (r,) = case.in_features, case.out_features, case.ranks
    alpha = case.alpha(0)
    data, rng = draw(case), np.random.default_rng(case.seed)
    signs = np.where(np.arange(m) % 2 == 0, 1.0, -1.0)[:, None]
    # h = 256 / alpha per rank; the numerator is alpha * r * h * 64 = 2**18, y is 2**18 / 16 = 2**14.
    A = np.full((r, n), 256.0 / (alpha * n))
    B = np.full((m, r), 64.0) * signs
    x = np.ones((*case.batch, n))
    dyadic = AdapterValues(A, np.ones((r, 1)), B)
    yield "x @ (A * E).T @ B.T * scaling is 262144", replace(data, x=x, adapters=(dyadic,))
    spread = AdapterValues(
        exact(A * rng.uniform(0.7, 1.0, A.shape), torch.float32),
        exact(rng.uniform(0.8, 1.0, (r, 1)), torch.float32),
        exact(B * rng.uniform(0.7, 1.0, B.shape), torch.float32),
    )
    x = exact(rng.uniform(0.7, 1.0, x.shape), case.torch_dtype)
    yield "x @ (A * E).T @ B.T * scaling exceeds 65504", replace(data, x=x, adapters=(spread,))


@clause("DTYPE-5")
def test_parameters_stay_fp32(trial: Trial) -> None:
    def body(case: Case) -> None:
        for how, _, convert in CONVERSIONS:
            setup = trial.build(case)
            before = {
                (part, name): getattr(setup.layer, part)[name].detach().clone()
                for part in PARAMETERS
                for name in case.names
            }
            trial.calls += 1
            convert(setup.layer)
            for (part, name), value in before.items():
                after = getattr(setup.layer, part)[name]
                what = f"{part}[{name!r}] after {how}"
                trial.assert_that(
                    after.dtype == torch.float32,
                    f"{what} is {after.dtype}: small steps of an optimiser would be rounded away.",
                )
                trial.assert_same_bits(what, after, value)

    trial.check(
        body,
        [
            Case(trial.kind, "float32", 8, 5, (2,), ranks, ranknums=ranknums)
            for ranks, ranknums in (((3,), (2.7182817459106445,)), ((3, 2), ()))
        ],
    )


@clause("DTYPE-6")
def test_dx_has_xs_dtype(trial: Trial) -> None:
    def body(case: Case) -> None:
        setup = trial.build(case)
        leaf = setup.x.requires_grad_()
        x = leaf * 1.0  # what a layer inside of a model gets
        arrived: list[torch.Tensor] = []
        x.register_hook(arrived.append)  # type: ignore[no-untyped-call]
        y = setup.forward(x)
        torch.autograd.backward(y, setup.dout.to(y.dtype))
        for what, gradient in (
            ("The gradient of a leaf x", setup.run().dx),
            ("The gradient of an intermediate x", arrived[0] if arrived else None),
        ):
            trial.assert_that(gradient is not None, f"{what} is missing.")
            assert gradient is not None
            trial.assert_that(
                gradient.dtype == case.torch_dtype,
                f"{what} is {gradient.dtype} for an x of {case.torch_dtype}.",
            )

    compute_dtypes = DTYPES if trial.kind == "4bit" else (None,)
    trial.check(
        body,
        [
            Case(trial.kind, dtype, 8, 5, (3,), ranks, compute_dtype=compute, training=training)
            for dtype in DTYPES
            for compute in compute_dtypes
            for ranks in ((3,), (3, 2))
            for training in (True, False)
        ],
    )


@clause("DTYPE-7", kinds=("4bit",))
def test_another_compute_dtype(trial: Trial) -> None:
    def body(case: Case) -> None:
        setup = trial.build(case)
        x, adapters, base = setup.data.x, setup.adapters(), setup.base_output()
        y = setup.forward()
        trial.assert_that(
            y.dtype == base.dtype,
            f"y is {y.dtype} for an x of {case.torch_dtype} and a compute dtype of "
            f"{case.compute_dtype}; the base layer returns {base.dtype}.",
        )
        if oracle.in_domain(x, adapters, base, setup.arithmetic):
            expected = oracle.expected_output(x, adapters, base, setup.arithmetic)
            trial.assert_within(f"y with compute dtype {case.compute_dtype}", y, expected)

    trial.check(
        body,
        [
            replace(case, compute_dtype=compute)
            for compute in DTYPES
            for adapters, training in ((1, True), (2, False))
            for case in probes(trial.kind, adapters=adapters, training=training)
            if case.dtype != compute
        ],
    )


@clause("DTYPE-8")
def test_sums_are_accumulated_in_fp32(trial: Trial) -> None:
    def body(case: Case) -> None:
        for over, parts, shape, data in _cancelling_sums(case):
            setup = trial.build(replace(case, **shape), data=data)
            base, run = setup.base_run(), setup.run()
            adapters = [oracle.exact_adapter(a) for a in setup.adapters()]
            # Only the values are used: nothing but the last addition to the base output rounds.
            free = oracle.Arithmetic.strict("float32")
            y = oracle.expected_output(data.x, adapters, base.y, free)
            grad = oracle.expected_gradients(data.x, adapters, data.dout, base.dx, free)
            for part, got, wanted in (
                ("y", run.y, exact(y.value, case.torch_dtype)),
                ("dx", run.dx, exact(grad.dx.value, case.torch_dtype)),
                ("dA", run.dA[0], grad.dA[0].value),
                ("dE", run.dE[0], grad.dE[0].value),
                ("dB", run.dB[0], grad.dB[0].value),
            ):
                if part in parts:
                    what = f"{part}, a sum over {over},"
                    trial.assert_same_bits(what, got, torch.from_numpy(wanted))

    trial.check(
        body,
        [
            Case(
                trial.kind,
                dtype,
                alphas=(ALPHA,),
                ranknums=(oracle.exact_ranknum(RANKNUM_POWER),),
                seed=seed,
            )
            for dtype in HALVES
            for seed in range(3)
        ],
    )


def _cancelling_sums(
    case: Case,
) -> Iterator[tuple[str, tuple[str, ...], dict[str, Any], Data]]:
    """Data that sum `big + 1 + ... + 1 - big` over one dimension, in a different order for each element.

    All factors beside them are 1, c is 1/2 and the base weight is all ones, so that every stored
    intermediate is exact in half precision, and only a sum accumulated there loses the ones.
    Yields the dimension, the parts of a run that sum over it, the case's shape and its data.
    """
    rng, big = np.random.default_rng(case.seed), LOSES_ONE[case.dtype]
    terms = np.array([big, -big, *np.ones(ONES)])
    count, k = 5, len(terms)
    sums = np.stack([rng.permutation(terms) for _ in range(count)])  # count, k

    def one_hot(rows: int, n: int) -> np.ndarray:
        return np.eye(n)[np.arange(rows) % n]

    def data(x: np.ndarray, dout: np.ndarray, A: np.ndarray, B: np.ndarray) -> Data:
        weight = np.ones((dout.shape[-1], x.shape[-1]))
        return Data(weight, None, x, dout, (AdapterValues(A, np.ones((len(A), 1)), B),))

    def shape(values: Data) -> dict[str, Any]:
        rows, n = values.x.shape
        m, r = values.adapters[0].B.shape
        return {"in_features": n, "out_features": m, "batch": (rows,), "ranks": (r,)}

    for over, parts, given in (
        # h = x @ A.T
        (
            "in_features",
            ("y",),
            data(sums, np.ones((count, 3)), np.ones((1, k)), np.ones((3, 1))),
        ),
        # h @ B.T
        (
            "the ranks of y",
            ("y",),
            data(one_hot(2, 4), np.ones((2, count)), np.ones((k, 4)), sums),
        ),
        # dA' = P.T @ x and dB = dZ.T @ h, with out = 1
        (
            "rows",
            ("dA", "dE", "dB"),
            data(one_hot(1, 4).repeat(k, 0), sums[:1].T, np.ones((1, 4)), np.ones((1, 1))),
        ),
        # P = dZ @ B; not dE, whose order may begin with the sums over rows, of 257 and the like
        (
            "out_features",
            ("dx", "dA"),
            data(one_hot(count, 8), sums, np.ones((1, 8)), np.ones((k, 1))),
        ),
        # dx = P @ A'
        (
            "the ranks of dx",
            ("dx",),
            data(one_hot(2, count), np.ones((2, 1)), sums.T, np.ones((1, k))),
        ),
    ):
        yield over, parts, shape(given), given


@clause("DTYPE-9")
def test_global_state_is_left_alone(trial: Trial) -> None:
    def body(case: Case) -> None:
        autocast = torch.bfloat16 if case.dtype == "float32" else case.torch_dtype
        device = trial.device.type
        surroundings: tuple[tuple[str, Callable[[], Any]], ...] = (
            ("", torch.enable_grad),
            (" under no_grad", torch.no_grad),
            (" under inference_mode", torch.inference_mode),
            (" under autocast", lambda: torch.autocast(device, dtype=autocast)),
            (" with autocast off", lambda: torch.autocast(device, enabled=False)),
        )
        threads, default = torch.get_num_threads(), torch.get_default_dtype()
        for where, surrounding in surroundings:
            setup = trial.build(case)
            x = setup.x
            with ExitStack() as stack:
                # Whatever a port leaves behind must not reach the next clause.
                stack.callback(torch.set_num_threads, threads)
                stack.callback(torch.set_default_dtype, default)
                # A number that nobody sets: not one, not all cores.
                torch.set_num_threads(max(threads, os.cpu_count() or 1) + 1)
                stack.enter_context(surrounding())
                before = _global_state(device)
                setup.forward(x)
                after = _global_state(device)
            for what, value in before.items():
                trial.assert_that(
                    after[what] == value,
                    f"{what} was {value} before a forward{where}, and is {after[what]} after it.",
                )

    trial.check(
        body,
        [
            Case(trial.kind, dtype, 8, 5, (2,), (3, 2), training=training)
            for dtype in DTYPES
            for training in (True, False)
        ],
    )


def _global_state(device: str) -> dict[str, object]:
    return {
        "torch's default dtype": torch.get_default_dtype(),
        "the grad mode": torch.is_grad_enabled(),
        "inference mode": torch.is_inference_mode_enabled(),
        "autocast": torch.is_autocast_enabled(device),
        "the autocast dtype": torch.get_autocast_dtype(device),
        "autocast's cache": torch.is_autocast_cache_enabled(),
        "the number of threads": torch.get_num_threads(),
        "deterministic algorithms": torch.are_deterministic_algorithms_enabled(),
        "TF32 in matrix products": torch.backends.cuda.matmul.allow_tf32,
    }

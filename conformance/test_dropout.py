"""Chapter DROP: what dropout does to the update, and that every adapter and every call has its own.

The mask is read off the output. A reading layer's first rank-`in` block is diagonal, and adapter a
alone writes it to outputs a * in ... (a + 1) * in - 1, so each of those is one element of dropout_a(x)
times known numbers. Its other ranks and outputs mix everything, and are compared with the contract
for the mask that was read: dropout anywhere else than on x does not fit it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace

import numpy as np
import torch
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy
from torch.utils.checkpoint import checkpoint

from conformance import oracle
from conformance.case import DTYPES, AdapterValues, Case, Data, DType, as_float64, exact
from conformance.spec import Kind, clause
from conformance.strategies import probes
from conformance.trial import Run, Setup, Trial
from conformance.values import draw

Masks = dict[str, np.ndarray]
MIXED = 3  # ranks and outputs of a reading layer that mix all of x

# A conforming port fails a statistical clause, for one of the two layers, with less than this chance...
FALSE_ALARM = 1e-9
# ... although it may make as many tests of its masks as this: each test gets an equal share.
MAX_TESTS = 20_000


# --- reading masks ------------------------------------------------------------------------------


def reading_case(
    kind: Kind,
    dtype: DType,
    n: int,
    batch: tuple[int, ...],
    dropouts: tuple[float, ...],
    seed: int = 0,
    mixed: int = MIXED,
) -> Case:
    """A case whose masks can be read off the output; `mixed` of 0 leaves nothing else in it."""
    return Case(
        kind,
        dtype,
        in_features=n,
        out_features=n * len(dropouts) + mixed,
        batch=batch,
        ranks=(n + mixed,) * len(dropouts),
        dropouts=dropouts,
        # Far below the update, whose roundings in half precision then stay visible.
        base_scale=2.0**-10,
        seed=seed,
    )


def reading_cases(kind: Kind, adapters: int = 1) -> SearchStrategy[Case]:
    """Random reading layers."""
    rates = st.sampled_from([0.5, 0.25, 0.1, 0.75, 0.9])
    return st.builds(
        reading_case,
        st.just(kind),
        st.sampled_from(DTYPES),
        st.sampled_from([4, 3, 8, 17, 33, 64]),
        st.sampled_from([(2,), (1,), (5,), (17,), (2, 3), (2, 1, 3)]),
        st.tuples(*[rates] * adapters),
        st.integers(0, 2**16),
    )


def reading_probes(kind: Kind) -> Iterable[Case]:
    """Enough elements that a mask which drops all or none does not happen by chance."""
    for dtype in DTYPES:
        for seed, p in enumerate((0.5, 0.1, 0.9)):
            yield reading_case(kind, dtype, 17, (4, 5), (p,), seed)


def reading_data(case: Case) -> Data:
    """The arrays of a reading layer: x, E and A's diagonal are nowhere near zero."""
    data, rng = draw(case), np.random.default_rng([case.seed, 1])
    n, m = case.in_features, case.out_features

    def signed(*shape: int) -> np.ndarray:
        return rng.choice([-1.0, 1.0], shape) * 2.0 ** rng.uniform(-1.0, 1.0, shape)

    adapters = []
    for index, r in enumerate(case.ranks):
        A = rng.standard_normal((r, n)) / np.sqrt(n)
        A[:n] = np.diag(signed(n))
        B = rng.standard_normal((m, r)) / np.sqrt(r)
        B[: n * len(case.ranks)] = 0.0
        B[n * index + np.arange(n), np.arange(n)] = 1.0
        adapters.append(AdapterValues(*(exact(v, torch.float32) for v in (A, signed(r, 1), B))))
    x = exact(signed(*case.batch, n), case.torch_dtype)
    return Data(data.weight, data.bias, x, data.dout, tuple(adapters))


def build(trial: Trial, case: Case) -> Setup:
    return trial.build(case, data=reading_data(case))


def read_masks(setup: Setup, y: torch.Tensor, base: torch.Tensor | None = None) -> Masks:
    """By adapter, which elements of x (..., in) this output says were kept."""
    n, x = setup.case.in_features, setup.data.x
    setup.trial.assert_that(
        y.shape == (*x.shape[:-1], setup.case.out_features), f"y has shape {tuple(y.shape)}."
    )
    update = as_float64(y) - as_float64(setup.base_output() if base is None else base)
    masks = {}
    for index, (name, a) in enumerate(zip(setup.case.names, setup.adapters(), strict=True)):
        kept = x * a.A.diagonal() * a.E[:n, 0] * a.c / (1.0 - setup.case.dropout(index))
        masks[name] = update[..., n * index : n * (index + 1)] / kept > 0.5
    return masks


def read_calls(setup: Setup, calls: int) -> np.ndarray:
    """The masks of the first adapter over several forwards, (calls, ..., in)."""
    name, base = setup.case.names[0], setup.base_output()
    outputs = (setup.forward().detach() for _ in range(calls))
    return np.stack([read_masks(setup, y, base)[name] for y in outputs])


def assert_drops(trial: Trial, masks: Masks, case: Case) -> None:
    """Each mask keeps something and drops something, where chance can hardly do otherwise."""
    for index, (name, keep) in enumerate(masks.items()):
        p = case.dropout(index)
        if p**keep.size + (1.0 - p) ** keep.size < FALSE_ALARM / MAX_TESTS:
            trial.assert_that(
                bool(keep.any() and not keep.all()),
                f"With p = {p}, `{name}` keeps {int(keep.sum())} of {keep.size} elements of x.",
            )


def assert_output(trial: Trial, setup: Setup, y: torch.Tensor, masks: Masks) -> None:
    """y is the contract's for these masks: an element is gone, or scaled by 1 / (1 - p)."""
    trial.assert_within(
        "y",
        y,
        oracle.expected_output(
            setup.data.x, setup.adapters(masks), setup.base_output(), setup.arithmetic
        ),
    )


def assert_gradients(trial: Trial, setup: Setup, run: Run, masks: Masks, when: str = "") -> None:
    """dx, dA, dE and dB are the contract's for these masks."""
    expected = oracle.expected_gradients(
        setup.data.x, setup.adapters(masks), setup.data.dout, setup.base_run().dx, setup.arithmetic
    )
    trial.assert_within(f"dx{when}", run.dx, expected.dx)
    for part, gradients, bounded in (
        ("dA", run.dA, expected.dA),
        ("dE", run.dE, expected.dE),
        ("dB", run.dB, expected.dB),
    ):
        for name, got, wanted in zip(setup.case.names, gradients, bounded, strict=True):
            trial.assert_within(f"{part} of `{name}`{when}", got, wanted)


# --- chance -------------------------------------------------------------------------------------


def assert_rates(
    trial: Trial, what: str, counts: Sequence[int] | np.ndarray, total: int, rate: float
) -> None:
    """Each of the counts, of `total` independent events of probability `rate`, is no wonder.

    Chernoff: P(K/N >= k/N) <= exp(-N KL(k/N || q)) for k/N >= q, and likewise below. Hence
    P(N KL(K/N || q) > t) <= 2 exp(-t), for every N: with t = ln(2 MAX_TESTS / FALSE_ALARM) a test
    has a false alarm with a chance of at most FALSE_ALARM / MAX_TESTS.
    """
    seen = np.asarray(counts, dtype=np.float64) / total
    surprise = np.zeros_like(seen)
    for s, q in ((seen, rate), (1.0 - seen, 1.0 - rate)):
        surprise += total * s * np.log(np.where(s > 0, s, q) / q)
    worst = int(surprise.argmax())
    trial.compared += seen.size - 1
    trial.assert_that(
        float(surprise[worst]) <= math.log(2.0 * MAX_TESTS / FALSE_ALARM),
        f"{what}{f' {worst}' if seen.size > 1 else ''}: {int(counts[worst])} of {total} "
        f"({seen[worst]:.5g}), expected about {rate * total:.6g} ({rate:.5g}). "
        f"Chance does this once in e^{surprise[worst]:.0f} runs.",
    )


def assert_independent(
    trial: Trial, what: str, keep: np.ndarray, p: float, lags: Sequence[int]
) -> None:
    """Elements that are a lag apart, in the order of memory, agree as often as chance has it.

    A lag's pairs are disjoint, so for an honest mask they agree independently of each other, with
    probability p^2 + (1 - p)^2.
    """
    for lag in lags:
        first, second = keep.reshape(-1, 2, lag).swapaxes(0, 1)
        assert_rates(
            trial,
            f"{what}: equal fates of elements {lag} apart",
            [int((first == second).sum())],
            first.size,
            p**2 + (1.0 - p) ** 2,
        )


def powers_of_two(below: int, start: int = 1) -> list[int]:
    return [start << k for k in range(64) if start << k < below]


# --- clauses ------------------------------------------------------------------------------------


@clause("DROP-1")
def test_an_element_is_dropped_or_scaled_up(trial: Trial) -> None:
    def body(case: Case) -> None:
        setup = build(trial, case)
        y = setup.forward().detach()
        masks = read_masks(setup, y)
        assert_drops(trial, masks, case)
        assert_output(trial, setup, y, masks)

    trial.search(reading_cases(trial.kind), body, reading_probes(trial.kind), cost=2)


@clause("DROP-2")
def test_the_kept_fraction_is_one_minus_p(trial: Trial) -> None:
    def body(case: Case) -> None:
        keep = read_calls(build(trial, case), 1).reshape(-1, case.in_features)
        rate = 1.0 - case.dropout(0)
        assert_rates(trial, "elements kept", [int(keep.sum())], keep.size, rate)
        # A fault at the edge of a kernel's blocks would be lost in the whole.
        columns, rows = keep.sum(axis=0), keep.sum(axis=1)
        assert_rates(trial, "elements kept in column", columns, len(keep), rate)
        assert_rates(trial, "elements kept in row", rows, case.in_features, rate)

    # Uniform numbers drawn in half precision are too often zero: 2^-8 or 2^-11 of them for a grid of
    # 8 or 11 bits, and 2^-12 for torch.rand in fp16, where 1 wraps. A p below that shows it: of 2^18
    # elements about 26 are dropped, and at least 90 would be.
    rare = 1e-4
    trial.check(
        body,
        [
            reading_case(trial.kind, dtype, n, (rows,), (p,), mixed=0)
            for dtype in DTYPES
            for n, rows, p in ((65, 257, 0.1), (65, 257, 0.5), (17, 100, 0.9), (64, 4096, rare))
        ],
    )


@clause("DROP-3")
def test_backward_uses_the_mask_of_its_forward(trial: Trial) -> None:
    def body(case: Case) -> None:
        setup = build(trial, case)
        parameters = [
            p[name]
            for p in (setup.layer.lora_A, setup.layer.lora_E, setup.layer.lora_B)
            for name in case.names
        ]
        inputs = [setup.x.requires_grad_() for _ in range(2)]
        outputs = [setup.forward(x) for x in inputs]
        if case.seed % 2:
            # What the layer does by now is no concern of a graph that was made in training.
            setup.layer.eval()
            setup.base.train()
        for number, (x, y) in enumerate(zip(inputs, outputs, strict=True), start=1):
            masks = read_masks(setup, y.detach())
            assert_drops(trial, masks, case)
            dx, *rest = torch.autograd.grad(y, [x, *parameters], setup.dout.to(y.dtype))
            count = len(case.names)
            dA, dE, dB = (tuple(rest[i * count : (i + 1) * count]) for i in range(3))
            run = Run(y.detach(), dx, dA, dE, dB)
            assert_gradients(trial, setup, run, masks, f" of call {number} of 2")

    trial.search(reading_cases(trial.kind), body, reading_probes(trial.kind), cost=4)


@clause("DROP-4")
def test_eval_mode_has_no_dropout(trial: Trial) -> None:
    def body(case: Case) -> None:
        setups = [build(trial, c) for c in (case, replace(case, dropouts=()))]
        for setup in setups:
            setup.forward()  # in train mode
            setup.layer.eval()
        got, expected = (setup.forward() for setup in setups)
        trial.assert_same_bits("y in eval mode", got, expected)
        setups[0].layer.train()
        y = setups[0].forward().detach()
        masks = read_masks(setups[0], y)
        assert_drops(trial, masks, case)
        assert_output(trial, setups[0], y, masks)

    trial.check(body, reading_probes(trial.kind))


@clause("DROP-5")
def test_the_base_layer_sees_all_of_x(trial: Trial) -> None:
    def body(case: Case) -> None:
        setup = build(trial, case)
        for values in setup.data.adapters:
            values.E[...] = 0.0
        setup.install()
        run, base = setup.run(), setup.base_run()
        trial.assert_same_bits("y with dropout and E = 0", run.y, base.y)
        assert base.dx is not None
        trial.assert_same_bits("dx with dropout and E = 0", run.dx, base.dx)

    trial.check(body, reading_probes(trial.kind))


@clause("DROP-6")
def test_elements_are_dropped_independently(trial: Trial) -> None:
    def body(case: Case) -> None:
        # Over many calls with two elements each, a port that drops a fixed number of them shows.
        keep = read_calls(build(trial, case), 256 if case.in_features == 2 else 1)
        assert_independent(trial, "mask", keep, case.dropout(0), powers_of_two(keep.size))

    # The lags are powers of two, and so are the shapes: 1 is a neighbour, in_features the next row,
    # and the largest the other half of the batch.
    shapes: list[tuple[DType, int, tuple[int, ...]]] = [("float32", 2, (1,))]
    for dtype in DTYPES:
        shapes += [(dtype, 64, (8, 16)), (dtype, 8, (1024,))]
    trial.check(
        body, [reading_case(trial.kind, dtype, n, b, (0.5,), mixed=0) for dtype, n, b in shapes]
    )


@clause("DROP-7")
def test_each_forward_draws_a_fresh_mask(trial: Trial) -> None:
    def body(case: Case) -> None:
        setup = build(trial, case)
        base, masks = setup.base_output(), []
        for step in range(8):
            # Backward in the reverse order: one that winds torch's generator back to draw its mask
            # again, and leaves it there, makes the next forward draw an old mask.
            outputs = [setup.forward(setup.x.requires_grad_()) for _ in range(2)]
            for y in reversed(outputs):
                torch.autograd.backward(y, setup.dout.to(y.dtype))
                setup.layer.zero_grad()
            masks += [read_masks(setup, y.detach(), base)[case.names[0]] for y in outputs]
            if step == 4:
                setup.layer.eval()
                setup.layer.train()
        keep, p, size = np.stack(masks), case.dropout(0), masks[0].size
        lags = powers_of_two(keep.size, start=size)
        assert_independent(trial, "masks of successive calls", keep, p, lags)
        assert_independent(trial, "masks of successive steps", keep[1:-1], p, [size])

    trial.check(
        body, [reading_case(trial.kind, dtype, 64, (8,), (0.5,), mixed=0) for dtype in DTYPES]
    )


@clause("DROP-8")
def test_the_generators_state_decides_the_mask(trial: Trial) -> None:
    def body(case: Case) -> None:
        setup, name = build(trial, case), case.names[0]

        def seeded(seed: int) -> np.ndarray:
            torch.manual_seed(seed)
            return read_masks(setup, setup.forward().detach())[name]

        first, other, again = (seeded(s) for s in (case.seed, case.seed + 1, case.seed))
        trial.assert_that(
            bool((first == again).all()),
            f"{int((first != again).sum())} of {first.size} elements of x have another fate after "
            "the same torch.manual_seed.",
        )
        trial.assert_that(
            bool((first != other).any()), "Another torch.manual_seed gives the same mask."
        )
        for reentrant in (True, False):

            def recomputed(x: torch.Tensor, reentrant: bool = reentrant) -> torch.Tensor:
                y: torch.Tensor = checkpoint(setup.layer, x, use_reentrant=reentrant)
                return y

            run = setup.run(forward=recomputed)
            masks = read_masks(setup, run.y)
            assert_drops(trial, masks, case)
            when = f" under checkpointing (use_reentrant={reentrant})"
            assert_gradients(trial, setup, run, masks, when)

    trial.check(body, [reading_case(trial.kind, d, 17, (3, 5), (0.5,)) for d in DTYPES])


def _generator_states(device: torch.device) -> list[torch.Tensor]:
    states = [torch.get_rng_state()]
    return [*states, torch.cuda.get_rng_state(device)] if device.type == "cuda" else states


@clause("DROP-9")
def test_p_of_zero_is_no_dropout(trial: Trial) -> None:
    def body(case: Case) -> None:
        setup = trial.build(case)
        before = _generator_states(trial.device)
        trained = setup.forward()
        for old, new in zip(before, _generator_states(trial.device), strict=True):
            trial.assert_that(torch.equal(old, new), "p = 0 draws random numbers in train mode.")
        setup.layer.eval()
        setup.base.train()  # the base layer's two modes differ; the update's are compared
        trial.assert_same_bits("y in train mode", trained, setup.forward())

    trial.check(body, [replace(c, dropouts=(0.0, 0.0)) for c in probes(trial.kind, adapters=2)])


@clause("DROP-10")
def test_each_adapter_has_its_own_dropout(trial: Trial) -> None:
    def body(case: Case) -> None:
        setup = build(trial, case)
        run = setup.run()
        masks = read_masks(setup, run.y)
        assert_drops(trial, masks, case)
        assert_output(trial, setup, run.y, masks)
        assert_gradients(trial, setup, run, masks)
        rates = [1.0 - case.dropout(i) for i in range(2)]
        one, two = (masks[name] for name in case.names)
        for name, keep, rate in zip(case.names, (one, two), rates, strict=True):
            if rate < 1.0:
                kept = [int(keep.sum())]
                assert_rates(trial, f"elements that `{name}` keeps", kept, keep.size, rate)
        if max(rates) < 1.0:
            both = rates[0] * rates[1] + (1.0 - rates[0]) * (1.0 - rates[1])
            agree = [int((one == two).sum())]
            assert_rates(trial, "elements that both treat alike", agree, one.size, both)

    trial.search(
        reading_cases(trial.kind, adapters=2),
        body,
        [
            reading_case(trial.kind, dtype, 17, (64,), dropouts, seed)
            for dtype in DTYPES
            for seed, dropouts in enumerate(
                ((0.5, 0.5), (0.25, 0.5), (0.8, 0.1), (0.0, 0.5), (0.5, 0.0))
            )
        ],
        cost=4,
    )

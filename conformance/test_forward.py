"""Chapter FWD: what the layer computes, on which inputs, and what it leaves alone."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from conformance import oracle
from conformance.case import DTYPES, Case, as_float64
from conformance.real import real_cases
from conformance.spec import clause
from conformance.strategies import cases, dyadic_cases, probes
from conformance.trial import Setup, Trial


def assert_output(trial: Trial, setup: Setup, what: str = "y") -> None:
    """y is within the bound, given the output of a twin of the base layer."""
    x, adapters, base = setup.data.x, setup.adapters(), setup.base_output()
    if oracle.in_domain(x, adapters, base, setup.arithmetic):
        expected = oracle.expected_output(x, adapters, base, setup.arithmetic)
        trial.assert_within(what, setup.forward(), expected)


def output_of(trial: Trial) -> Callable[[Case], None]:
    return lambda case: assert_output(trial, trial.build(case))


@clause("FWD-1")
def test_output_is_the_base_output_plus_the_update(trial: Trial) -> None:
    trial.search(cases(trial.kind), output_of(trial), probes(trial.kind))


@clause("FWD-2")
def test_dyadic_outputs_are_exact(trial: Trial) -> None:
    def body(case: Case) -> None:
        setup = trial.build(case)
        base = setup.base_output()
        expected = oracle.exact_output(setup.data.x, setup.adapters(), base, case.torch_dtype)
        if expected is not None:
            trial.assert_same_bits("y", setup.forward(), expected.to(trial.device))

    trial.check(body, dyadic_cases(trial.kind))


@clause("FWD-3")
def test_one_hot_inputs_read_off_the_update(trial: Trial) -> None:
    def body(case: Case) -> None:
        setup = trial.build(case)
        setup.data.x[...] = np.eye(case.in_features)
        live = case.seed % case.ranks[0]
        E = setup.data.adapters[0].E
        E[np.arange(len(E)) != live] = 0.0
        setup.install()
        assert_output(trial, setup)
        # A small singular value is no zero.
        E *= 2.0**-14
        setup.install()
        assert_output(trial, setup, "y with a small singular value")

    trial.check(
        body,
        [
            Case(
                trial.kind,
                dtype=dtype,
                in_features=n,
                out_features=m,
                batch=(n,),
                ranks=(r,),
                base_scale=2.0**-10,
                seed=seed,
            )
            for dtype in DTYPES
            for seed, (n, m, r) in enumerate([(4, 3, 1), (8, 5, 3), (33, 17, 8)])
        ],
    )


@clause("FWD-4")
def test_output_agrees_with_the_references_own_weights(trial: Trial) -> None:
    trial.require(
        trial.kind == "4bit" or trial.device.type == "cpu",
        "on CUDA an 8-bit base always quantises its activations; FWD-1 judges the adapter there",
    )

    def body(case: Case) -> None:
        setup = trial.build(case)
        weight = (
            oracle.weight_4bit(setup.data.weight, case.quant_type, setup.nested_offset())
            if case.kind == "4bit"
            else oracle.weight_8bit(setup.data.weight)
        )
        expected = oracle.expected_output_from_weight(
            setup.data.x, weight, setup.data.bias, setup.adapters(), setup.arithmetic
        )
        if expected is not None:
            trial.assert_within("y", setup.forward(), expected)

    trial.search(
        cases(trial.kind, values=("gaussian", "heavy", "onehot")), body, probes(trial.kind)
    )


@clause("FWD-5")
def test_no_singular_value_no_update(trial: Trial) -> None:
    def body(case: Case) -> None:
        setup = trial.build(case)
        for values in setup.data.adapters:
            values.E[...] = 0.0
        setup.install()
        trial.assert_same_bits("y with E = 0", setup.forward(), setup.base_output())

    trial.search(
        cases(trial.kind, training=None, adapters=2, batches=((2,), (17,), (2, 3))),
        body,
        [*probes(trial.kind), *probes(trial.kind, training=False)],
        cost=4,
    )


@clause("FWD-6")
def test_rank_zero_is_the_base_layer(trial: Trial) -> None:
    def body(case: Case) -> None:
        setup = trial.build(replace(case, ranks=(0,), ranknums=(), alphas=()))
        trial.assert_same_bits("y with r = 0", setup.forward(), setup.base_output())

    trial.check(body, [*probes(trial.kind), *probes(trial.kind, training=False)])


@clause("FWD-7")
def test_a_negative_singular_value_subtracts(trial: Trial) -> None:
    def body(case: Case) -> None:
        setup = trial.build(case)
        E = setup.data.adapters[0].E
        E[...] = -np.abs(E)
        setup.install()
        assert_output(trial, setup, "y with E < 0")
        E[...] = -E
        setup.install()
        assert_output(trial, setup, "y with E > 0")

    trial.search(cases(trial.kind), body, probes(trial.kind), cost=2)


@clause("FWD-8")
def test_any_number_of_leading_dimensions(trial: Trial) -> None:
    def body(case: Case) -> None:
        setup = trial.build(case)
        try:
            base = setup.base_output()
        except Exception as error:
            # bitsandbytes' 8-bit layer takes 2-D and 3-D inputs only in eval mode.
            trial.require(case.kind == "8bit" and not case.training, f"the base raised {error!r}")
            return
        x, adapters = setup.data.x, setup.adapters()
        y = setup.forward()
        trial.assert_that(
            y.shape == (*case.batch, case.out_features),
            f"y has shape {tuple(y.shape)} for an x of shape {x.shape}.",
        )
        trial.assert_within("y", y, oracle.expected_output(x, adapters, base, setup.arithmetic))

    trial.check(
        body,
        [
            Case(trial.kind, dtype, 8, 5, batch, (3,), training=training, seed=len(batch))
            for dtype in DTYPES
            for training in (True, False)
            for batch in ((), (1,), (4,), (2, 3), (2, 1, 3), (2, 2, 1, 2))
        ],
    )


@clause("FWD-9")
def test_an_empty_batch_gives_an_empty_output(trial: Trial) -> None:
    def body(case: Case) -> None:
        setup = trial.build(case)
        y, wanted = setup.forward(), (*case.batch, case.out_features)
        trial.assert_that(
            tuple(y.shape) == wanted,
            f"y of an empty batch has shape {tuple(y.shape)}, expected {wanted}.",
        )

    trial.check(
        body,
        [
            Case(trial.kind, dtype, 8, 5, batch, (3,))
            for dtype in DTYPES
            for batch in ((0,), (2, 0), (0, 3))
        ],
    )


def _layouts(x: torch.Tensor) -> dict[str, torch.Tensor]:
    """The same values in other memory layouts."""
    wide = torch.stack([x, torch.full_like(x, 7.0)], dim=-1)
    return {
        "transposed": x.transpose(0, -1).contiguous().transpose(0, -1),
        "strided": wide[..., 0],
        "offset": torch.cat([torch.full_like(x[:1], 7.0), x])[1:],
    }


@clause("FWD-10")
def test_memory_layout_does_not_matter(trial: Trial) -> None:
    def body(case: Case) -> None:
        setup = trial.build(case)
        x, adapters = setup.data.x, setup.adapters()
        for layout, view in _layouts(setup.x).items():
            expected = oracle.expected_output(
                x, adapters, setup.base_output(view), setup.arithmetic
            )
            trial.assert_within(f"y of a {layout} x", setup.forward(view), expected)
        row = setup.x[:1]
        setup.data.x[...] = as_float64(row.expand(setup.x.shape))
        expected = oracle.expected_output(
            setup.data.x, adapters, setup.base_output(row.expand(setup.x.shape)), setup.arithmetic
        )
        trial.assert_within(
            "y of an expanded x", setup.forward(row.expand(setup.x.shape)), expected
        )

    trial.check(
        body,
        [
            Case(trial.kind, dtype, 64, 33, batch, (3,), training=training)
            for dtype in DTYPES
            for training in (True, False)
            for batch in ((5,), (3, 4))
        ],
    )


@clause("FWD-11")
def test_inputs_are_left_alone(trial: Trial) -> None:
    def body(case: Case) -> None:
        setup = trial.build(case)
        x, dout = setup.x, setup.dout
        setup.run(x, dout)
        trial.assert_same_bits("x after the call", x, setup.x)
        trial.assert_same_bits("the incoming gradient after the call", dout, setup.dout)

    trial.check(
        body,
        [
            replace(case, dropouts=dropouts)
            for dropouts in ((), (0.5,))
            for case in probes(trial.kind)
        ],
    )


@clause("FWD-12")
def test_the_base_output_is_left_alone(trial: Trial) -> None:
    def body(case: Case) -> None:
        setup = trial.build(case)
        kept: list[torch.Tensor] = []
        setup.base.register_forward_hook(lambda _m, _a, y: kept.append(y))
        y = setup.run().y
        trial.assert_that(bool(kept), "The base layer was not called: its output cannot be seen.")
        trial.assert_same_bits("the base output that a hook kept", kept[0], setup.base_output())
        trial.assert_that(
            not torch.equal(y, kept[0]), "y equals the base output: the update is missing."
        )

        # A base output that is a view of a buffer: the buffer must survive, too.
        setup = trial.build(case)
        buffers: list[torch.Tensor] = []

        def return_a_view(_module: Any, _arguments: Any, y: torch.Tensor) -> torch.Tensor:
            buffer = torch.cat([y.detach().reshape(-1), y.detach().new_zeros(3)])
            buffers.append(buffer)
            return buffer[:-3].view(y.shape)

        setup.base.register_forward_hook(return_a_view)
        assert_output(trial, setup, "y over a base output that is a view")
        flat = buffers[-1][:-3].view(setup.base_output().shape)
        trial.assert_same_bits("the buffer under the base output", flat, setup.base_output())

    trial.check(body, [replace(c, bias=True) for c in probes(trial.kind)])


@clause("FWD-13")
def test_the_base_layer_is_left_alone(trial: Trial) -> None:
    def body(case: Case) -> None:
        setup = trial.build(case)
        twin = trial.build(case)  # its base was never run by the port
        setup.run()
        before, after = twin.base.state_dict(), setup.base.state_dict()
        trial.assert_that(
            set(before) == set(after),
            f"The base layer's state changed: {set(before) ^ set(after)}.",
        )
        for key, value in before.items():
            trial.assert_same_bits(f"base_layer.{key}", after[key], value, same_dtype=True)

    trial.check(body, [replace(c, bias=True) for c in probes(trial.kind)])


@clause("FWD-14")
def test_rows_do_not_see_each_other(trial: Trial) -> None:
    def body(case: Case) -> None:
        setup = trial.build(case)
        x, adapters = setup.data.x, setup.adapters()
        for row in range(len(x)):
            others = np.arange(len(x)) != row
            disturbed = x.copy()
            disturbed[others] = np.roll(disturbed[others], 1, axis=-1) * 4.0 + 1.0
            tensor = setup.tensor(disturbed)
            expected = oracle.expected_output(
                as_float64(tensor), adapters, setup.base_output(tensor), setup.arithmetic
            )
            y = setup.forward(tensor)
            trial.assert_within("y among other rows", y, expected)
        alone = setup.tensor(x[:1])
        expected = oracle.expected_output(
            x[:1], adapters, setup.base_output(alone), setup.arithmetic
        )
        trial.assert_within("y of a row alone", setup.forward(alone), expected)

    trial.check(
        body,
        [
            Case(trial.kind, dtype, 17, 5, (n,), (3,), base_scale=2.0**-10, seed=n)
            for dtype in DTYPES
            for n in (2, 3, 5)
        ],
    )


@clause("FWD-15")
def test_nan_and_infinity_stay_in_their_row(trial: Trial) -> None:
    def body(case: Case) -> None:
        setup = trial.build(case)
        adapters = setup.adapters()
        for poison in (math.nan, math.inf):
            for row in (0, len(setup.data.x) - 1):
                x = setup.x
                x[row, case.in_features // 2] = poison
                clean = [i for i in range(len(x)) if i != row]
                expected = oracle.expected_output(
                    setup.data.x[clean],
                    adapters,
                    setup.base_output(x)[clean],
                    setup.arithmetic,
                )
                y = setup.forward(x)
                trial.assert_within(f"y beside a row with {poison}", y[clean], expected)
                trial.assert_that(
                    not bool(torch.isfinite(y[row]).all()),
                    f"The row of x with {poison} gives a finite row of y.",
                )

    trial.check(
        body, [Case(trial.kind, dtype, 8, 5, (n,), (3,)) for dtype in DTYPES for n in (2, 7)]
    )


@clause("FWD-16")
def test_every_row_of_a_large_batch(trial: Trial) -> None:
    trial.check(
        output_of(trial),
        [
            Case(trial.kind, dtype, 8, 4, (rows,), (3,), base_scale=2.0**-10, seed=rows)
            for dtype in DTYPES
            for rows in (17, 33, 65, 129, 1025)
        ],
    )


@clause("FWD-17")
def test_ragged_shapes(trial: Trial) -> None:
    shapes = [
        (2, 1, 1),
        (5, 4, 1),
        (3, 5, 8),
        (5, 2, 3),
        (17, 33, 17),
        (33, 17, 40),
        (63, 65, 5),
        (65, 63, 70),
    ]
    trial.check(
        output_of(trial),
        [
            Case(trial.kind, dtype, n, m, (3,), (r,), base_scale=2.0**-10, seed=n)
            for dtype in DTYPES
            for n, m, r in shapes
        ],
    )


@clause("FWD-18")
def test_the_bias_enters_once(trial: Trial) -> None:
    def body(case: Case) -> None:
        setup = trial.build(case)
        x = torch.zeros_like(setup.x)
        # The base layer of a zero input is its bias, and so is y.
        trial.assert_same_bits("y of x = 0", setup.forward(x), setup.base_output(x))
        assert_output(trial, setup)

    trial.search(
        cases(trial.kind, bias=True, values=("gaussian",)),
        body,
        [replace(c, bias=True) for c in probes(trial.kind)],
        cost=4,
    )


@clause("FWD-19")
def test_a_second_call_gives_the_same_bits(trial: Trial) -> None:
    def body(case: Case) -> None:
        setup = trial.build(case)
        first = setup.forward().clone()
        setup.forward(setup.x * 2.0)
        trial.assert_same_bits("y of a later call", setup.forward(), first)

    trial.check(body, [*probes(trial.kind, adapters=2), *probes(trial.kind, training=False)])


@clause("FWD-20")
def test_the_base_layer_runs_once_on_x_as_given(trial: Trial) -> None:
    def body(case: Case) -> None:
        setup = trial.build(case)
        seen: list[torch.Tensor] = []
        setup.base.register_forward_pre_hook(lambda _m, arguments: seen.append(arguments[0]))
        setup.forward()
        trial.assert_that(len(seen) == 1, f"The base layer ran {len(seen)} times in one forward.")
        trial.assert_same_bits("the base layer's input", seen[0], setup.x)

    trial.check(body, probes(trial.kind, adapters=2))


@clause("FWD-21", kinds=("8bit",))
def test_outlier_columns_of_the_base(trial: Trial) -> None:
    def body(case: Case) -> None:
        setup = trial.build(case)
        setup.data.x[..., 1] = np.where(setup.data.x[..., 1] < 0, -9.0, 9.0)
        assert_output(trial, setup)

    trial.check(
        body,
        [
            Case(trial.kind, dtype, 33, 17, batch, (3,), threshold=6.0, training=training)
            for dtype in DTYPES
            for training in (True, False)
            for batch in ((5,), (2, 3))
        ],
    )


@clause("FWD-22")
def test_eval_mode(trial: Trial) -> None:
    batches = ((1,), (2,), (17,), (2, 3), (1, 17))
    trial.search(
        cases(trial.kind, training=False, batches=batches),
        output_of(trial),
        probes(trial.kind, training=False),
    )


@clause("FWD-24")
def test_updates_beyond_half_precision(trial: Trial) -> None:
    def body(case: Case) -> None:
        setup = trial.build(case)
        for values in setup.data.adapters:
            values.E[...] *= 2.0**20
        setup.install()
        assert_output(trial, setup)

    trial.check(body, probes(trial.kind, dtypes=("float32", "bfloat16"), adapters=2))


@clause("FWD-23")
def test_real_weights_and_activations(trial: Trial) -> None:
    trial.require(trial.profile.real_model or trial.only is not None, "profile quick has no model")
    trial.check(output_of(trial), real_cases(trial.kind))

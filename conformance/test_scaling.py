"""Chapter SCALE: the one scalar of an adapter, scaling / (ranknum + 1e-5), and what may change it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from hypothesis import strategies as st

from conformance import oracle
from conformance.case import DTYPES, Case
from conformance.spec import clause
from conformance.strategies import cases, dyadic_cases, probes
from conformance.trial import Setup, Trial

# Their 1e-5 weighs 8 % and 50 % of the divisor: every dtype sees it, and all scalars stay normal in fp16.
SMALL_RANKNUMS = (2.0**-13, 1e-5)
# Neither an integer nor any rank in the suite, and a divisor of less than one.
RANKNUMS = (6.5, 100.0, 0.375)


def assert_scaled(
    trial: Trial,
    setup: Setup,
    what: str = "y",
    *,
    base: torch.Tensor | None = None,
    scaling: float | None = None,
    ranknum: float | None = None,
) -> None:
    """y is within the bound, the first adapter having this scaling and ranknum instead of its own."""
    first, *others = setup.adapters()
    changed = replace(
        first,
        scaling=first.scaling if scaling is None else scaling,
        ranknum=first.ranknum if ranknum is None else ranknum,
    )
    x, adapters = setup.data.x, [changed, *others]
    base = setup.base_output() if base is None else base
    if oracle.in_domain(x, adapters, base, setup.arithmetic):
        expected = oracle.expected_output(x, adapters, base, setup.arithmetic)
        trial.assert_within(what, setup.forward(), expected)


def assert_scaling(trial: Trial, setup: Setup, expected: float, alpha: float, index: int) -> None:
    """`scaling` says what it is for an alpha."""
    name, rank = setup.case.names[index], setup.case.ranks[index]
    got = setup.layer.scaling[name]
    trial.assert_that(
        float(got) == expected,
        f"scaling[{name!r}] is {got!r} for lora_alpha = {alpha} and r = {rank}, expected {expected}.",
    )


@clause("SCALE-1")
def test_the_divisor_is_ranknum_plus_1e_5(trial: Trial) -> None:
    def body(case: Case) -> None:
        setup = trial.build(case)
        if case.values != "dyadic":
            assert_scaled(trial, setup)
            return
        base = setup.base_output()
        expected = oracle.exact_output(setup.data.x, setup.adapters(), base, case.torch_dtype)
        trial.assert_that(expected is not None, "# sanity: this case has no exact output.")
        assert expected is not None
        trial.assert_same_bits("y", setup.forward(), expected.to(trial.device))

    exact = list(dyadic_cases(trial.kind, dtypes=("float32",)))
    # c may be 5e4: a small alpha and one-hot rows keep the update in the range of fp16.
    small = [
        Case(
            trial.kind,
            dtype,
            in_features=8,
            out_features=5,
            batch=(8,),
            ranks=(3,),
            alphas=(2.0**-6,),
            ranknums=(float(np.float32(ranknum)),),
            values="onehot",
            base_scale=2.0**-10,
            seed=seed,
        )
        for dtype in DTYPES
        for seed, ranknum in enumerate(SMALL_RANKNUMS)
        # 2e-5 is not a normal number of fp16, in which a port may compute.
        if (dtype, ranknum) != ("float16", SMALL_RANKNUMS[1])
    ]
    trial.check(body, [*exact, *small])


@clause("SCALE-2")
def test_a_positive_alpha_is_the_scaling(trial: Trial) -> None:
    def body(case: Case) -> None:
        setup = trial.build(case)
        for index in range(len(case.ranks)):
            assert_scaling(trial, setup, case.alpha(index), case.alpha(index), index)
        assert_scaled(trial, setup)

    alphas = (3.0, 1.0, 0.5, 16.0, 2.75, 8.0)
    trial.search(
        _with_alphas(trial, alphas),
        body,
        [
            replace(probe, alphas=(alpha, 2.75))
            for alpha, probe in zip(alphas * 2, probes(trial.kind, adapters=2), strict=True)
        ],
        cost=2,
    )


@clause("SCALE-3")
def test_without_a_positive_alpha_the_scaling_is_r(trial: Trial) -> None:
    def body(case: Case) -> None:
        setup = trial.build(case)
        for index, rank in enumerate(case.ranks):
            assert_scaling(trial, setup, float(rank), case.alpha(index), index)
        assert_scaled(trial, setup)

    alphas = (0.0, -1.0, -2.5, -16.0)
    trial.search(
        _with_alphas(trial, alphas),
        body,
        [
            replace(probe, alphas=(alpha, 0.0))
            for alpha, probe in zip(alphas * 3, probes(trial.kind, adapters=2), strict=True)
        ],
        cost=2,
    )


def _with_alphas(trial: Trial, alphas: tuple[float, ...]) -> st.SearchStrategy[Case]:
    """Random cases of one or two adapters, each with one of these alphas."""
    return st.builds(
        lambda case, pair: replace(case, alphas=pair[: len(case.ranks)]),
        cases(trial.kind, adapters=2, values=("gaussian", "onehot")),
        st.tuples(st.sampled_from(alphas), st.sampled_from(alphas)),
    )


@clause("SCALE-4")
def test_the_stored_ranknum_divides(trial: Trial) -> None:
    def body(case: Case) -> None:
        setup = trial.build(case)  # its ranknum is not its rank
        base = setup.base_output()
        assert_scaled(trial, setup, "y with ranknum set before the first forward", base=base)
        for ranknum in RANKNUMS:
            if ranknum != case.ranknum(0):
                with torch.no_grad():
                    setup.layer.ranknum[case.names[0]].copy_(torch.tensor([ranknum]))
                what = f"y after ranknum was set to {ranknum}"
                assert_scaled(trial, setup, what, base=base, ranknum=ranknum)

    ranknums = st.sampled_from(RANKNUMS)
    trial.search(
        st.builds(
            lambda case, ranknum: replace(case, ranknums=(ranknum,)),
            cases(trial.kind, values=("gaussian", "onehot", "lora")),
            ranknums,
        ),
        body,
        [
            replace(probe, ranknums=(ranknum,))
            for ranknum, probe in zip(RANKNUMS * 4, probes(trial.kind), strict=True)
        ],
        cost=4,
    )


@clause("SCALE-5")
def test_ranknum_starts_at_r(trial: Trial) -> None:
    def body(case: Case) -> None:
        setup = trial.build(case, values=False)
        _assert_ranknums(trial, setup, "of a new layer")
        setup.run()
        setup.layer.enable_adapters(False)
        setup.layer.enable_adapters(True)
        setup.layer.eval()
        setup.layer.train()
        _assert_ranknums(trial, setup, "of a layer in use")

    trial.check(
        body,
        [
            Case(trial.kind, dtype, 8, 5, (2,), ranks, compute_dtype=compute)
            for dtype in DTYPES
            for compute in (DTYPES if trial.kind == "4bit" else (None,))
            for ranks in ((3,), (1, 12))
        ],
    )


def _assert_ranknums(trial: Trial, setup: Setup, when: str) -> None:
    for name, rank in zip(setup.case.names, setup.case.ranks, strict=True):
        ranknum = setup.layer.ranknum[name]
        what = f"ranknum[{name!r}] {when}"
        trial.assert_that(
            ranknum.detach().flatten().tolist() == [float(rank)],
            f"{what} is {ranknum.detach().flatten().tolist()}, expected [{float(rank)}].",
        )
        trial.assert_that(
            ranknum.dtype == torch.float32, f"{what} is {ranknum.dtype}, expected torch.float32."
        )
        trial.assert_that(
            not ranknum.requires_grad,
            f"{what} requires a gradient: an optimiser that is given it would train the scale.",
        )
        trial.assert_that(ranknum.grad is None, f"{what} received a gradient.")


@clause("SCALE-6")
def test_masking_keeps_the_scale(trial: Trial) -> None:
    def body(case: Case) -> None:
        setup, name = trial.build(case), case.names[0]
        base, before = setup.base_output(), setup.layer.ranknum[name].detach().clone()
        E = setup.data.adapters[0].E
        # One singular value after the other, down to the last: what rank allocation does.
        for rank in range(case.ranks[0] - 1):
            E[rank] = 0.0
            with torch.no_grad():
                mask = torch.from_numpy(E == 0.0).to(trial.device)
                setup.layer.lora_E[name].masked_fill_(mask, 0.0)
            setup.run()
            what = f"with {rank + 1} of {case.ranks[0]} singular values masked"
            assert_scaled(trial, setup, f"y {what}", base=base)
            after = setup.layer.ranknum[name]
            trial.assert_same_bits(f"ranknum {what}", after, before, same_dtype=True)

    trial.check(
        body,
        [
            Case(trial.kind, dtype, 8, 5, (3,), (4,), base_scale=2.0**-10, training=training)
            for dtype in DTYPES
            for training in (True, False)
        ],
    )


@clause("SCALE-7")
def test_a_new_scaling_is_used(trial: Trial) -> None:
    def body(case: Case) -> None:
        setup, name = trial.build(case), case.names[0]
        base = setup.base_output()
        assert_scaled(trial, setup, "y with the first scaling", base=base)
        for scaling in (2.5, -1.0, 16.0):
            setup.layer.scaling[name] = scaling
            what = f"y with a scaling of {scaling}"
            assert_scaled(trial, setup, what, base=base, scaling=scaling)
        if len(case.ranks) == 1:
            setup.layer.scaling[name] = 0.0
            trial.assert_same_bits("y with a scaling of zero", setup.forward(), base)

    two = (c for c in probes(trial.kind, adapters=2, training=False) if c.values != "heavy")
    trial.check(body, [*probes(trial.kind), *two])


@clause("SCALE-8")
def test_each_adapter_has_its_own_scale(trial: Trial) -> None:
    def body(case: Case) -> None:
        setup = trial.build(case)
        if case.values != "dyadic":
            assert_scaled(trial, setup)
            return
        base = setup.base_output()
        expected = oracle.exact_output(setup.data.x, setup.adapters(), base, case.torch_dtype)
        if expected is not None:
            trial.assert_same_bits("y", setup.forward(), expected.to(trial.device))

    trial.search(
        st.builds(
            lambda case: replace(case, ranknums=RANKNUMS[: len(case.ranks)]),
            cases(trial.kind, adapters=3, values=("gaussian", "onehot")),
        ),
        body,
        [
            *dyadic_cases(trial.kind, adapters=3, dtypes=("float32",)),
            *(replace(probe, ranknums=RANKNUMS) for probe in probes(trial.kind, adapters=3)),
        ],
        cost=2,
    )

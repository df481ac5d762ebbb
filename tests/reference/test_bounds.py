"""No valid implementation ever exceeds a bound, and the bounds are not much larger than errors."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from reference import (
    FORMATS,
    TF32,
    Adapter,
    Arithmetic,
    bound_gradients,
    bound_output,
    gradients_in_domain,
    in_domain,
    round_to,
)
from tests.reference.cases import FAMILIES, Case, Family, case
from tests.reference.judging import ratio
from tests.reference.pipelines import Pipeline, Sums, pipelines

SEEDS = range(10)  # times 6 families, 3 formats, 2 arithmetics: 360 layers, 4 pipelines on each
ARITHMETICS = [
    *(pytest.param(Arithmetic.strict(io), id=f"strict {io}") for io in FORMATS),
    *(pytest.param(Arithmetic.permissive(io), id=f"permissive {io}") for io in FORMATS),
    # x and dy in float32, the adapter in bfloat16 or TF32: autocast, tensor cores.
    pytest.param(Arithmetic(FORMATS["float32"], FORMATS["bfloat16"]), id="autocast"),
    pytest.param(Arithmetic(FORMATS["float32"], TF32), id="TF32"),
]


def ratios(c: Case, pipeline: Pipeline) -> dict[str, float]:
    """The worst error / bound of y and of each gradient, where the case is in the domain."""
    found: dict[str, float] = {}
    if in_domain(c.x, c.adapters, c.base, pipeline.arithmetic):
        y = bound_output(c.x, c.adapters, c.base, pipeline.arithmetic)
        found["y"] = ratio(pipeline.output(c.x, c.adapters, c.base), y)
    if gradients_in_domain(c.x, c.adapters, c.dout, c.base_dx, pipeline.arithmetic):
        dx, leaves = bound_gradients(c.x, c.adapters, c.dout, c.base_dx, pipeline.arithmetic)
        got_dx, got_leaves = pipeline.gradients(c.x, c.adapters, c.dout, c.base_dx)
        found["dx"] = ratio(got_dx, dx)
        for got, expected in zip(got_leaves, leaves, strict=True):
            for name, g in zip(("dA", "dE", "dB"), got, strict=True):
                found[name] = max(found.get(name, 0.0), ratio(g, getattr(expected, name)))
    return found


@pytest.mark.parametrize("arithmetic", ARITHMETICS)
def test_no_valid_pipeline_exceeds_a_bound_and_none_is_vacuous(arithmetic: Arithmetic) -> None:
    """Folds, orders of sums, storage, dropout, several adapters: error / bound <= 1 throughout.

    And the worst of them is no tiny fraction: a bound that is never approached catches nothing.
    """
    everything = pipelines(arithmetic)
    record: dict[str, float] = {}
    judged: Counter[str] = Counter()
    for family in FAMILIES:
        for seed in SEEDS:
            c = case(seed, family, arithmetic.io.name)
            for k in range(4):
                pipeline = everything[(7 * seed + 3 * k) % len(everything)]
                for name, value in ratios(c, pipeline).items():
                    assert value <= 1.0, f"{name}: {value:.3f} for {family}, {seed}, {pipeline}"
                    record[name] = max(record.get(name, 0.0), value)
                    judged[name] += 1
    print({name: round(value, 3) for name, value in record.items()}, dict(judged))
    assert min(judged.values()) > 100  # sanity check: the domain did not swallow the cases
    assert min(record.values()) > 0.05
    assert min(record["y"], record["dx"]) > 0.2


@pytest.mark.parametrize("family", FAMILIES)
def test_truncating_accumulators_are_covered_by_their_roundoff(family: Family) -> None:
    """Sums cut instead of rounded, as on tensor cores, stay within the bounds for 2^-23."""
    arithmetic = Arithmetic.permissive("float16", accumulator=2.0**-23)
    cut: tuple[Sums, ...] = ("truncating",)
    for seed in range(6):
        for pipeline in pipelines(arithmetic, cut)[seed::6]:
            assert max(ratios(case(seed, family, "float16"), pipeline).values(), default=0) <= 1.0


def test_the_declared_roundoff_of_the_accumulator_matters() -> None:
    """A long truncated sum of one sign exceeds the bound for rounding to nearest."""
    x = np.full((1, 600), 0.99 * 2.0**-23)  # each addition to 1 is cut off entirely
    x[0, 0] = 1.0
    x = round_to(x, "float32")
    a = Adapter(np.ones((1, 600)), np.ones((1, 1)), np.ones((1, 1)), 1.0, 1.0 - 1e-5)
    pipeline = Pipeline(Arithmetic.strict("float32"), "A", "result", "truncating")
    y = pipeline.output(x, [a], np.zeros((1, 1)))

    nearest = bound_output(x, [a], np.zeros((1, 1)), Arithmetic.strict("float32"))
    cut = bound_output(x, [a], np.zeros((1, 1)), Arithmetic.strict("float32", 2.0**-23))
    assert 0.9 < ratio(y, cut) <= 1.0
    assert ratio(y, nearest) > 1.8


@pytest.mark.parametrize("arithmetic", ARITHMETICS[:6])
def test_stacked_adapters_are_covered(arithmetic: Arithmetic) -> None:
    """All adapters as one of the summed rank, c folded into A, dense weights included."""
    seen = []
    for seed in range(40):
        c = case(seed, "cancelling", arithmetic.io.name)
        several = [replace(a, keep=None, p=0.0) for a in c.adapters]
        A = np.vstack([a.A * a.c for a in several])
        E, B = np.vstack([a.E for a in several]), np.hstack([a.B for a in several])
        stack = Adapter(A, E, B, 1.0, 1.0 - 1e-5)
        dx, _ = bound_gradients(c.x, several, c.dout, c.base_dx, arithmetic)
        y = bound_output(c.x, several, c.base, arithmetic)
        for fold, sums in (("A", "forward"), ("A", "blas"), ("dense", "blocks")):
            pipeline = Pipeline(arithmetic, fold, "hidden", sums, "accumulator")
            if in_domain(c.x, [stack], c.base, arithmetic):
                seen.append(ratio(pipeline.output(c.x, [stack], c.base), y))
            if gradients_in_domain(c.x, [stack], c.dout, c.base_dx, arithmetic):
                seen.append(ratio(pipeline.gradients(c.x, [stack], c.dout, c.base_dx)[0], dx))
    assert len(seen) > 100  # sanity check
    assert max(seen) <= 1.0


@pytest.mark.parametrize("io", ["bfloat16", "float16"])
def test_three_roundings_in_io_are_all_needed(io: str) -> None:
    """Cast, times s, over ranknum: of 4,096 outputs of one path, some need more than two thirds."""
    rng = np.random.default_rng(0)
    B = round_to(1 + rng.random((4096, 1)), "float32")
    a = Adapter(np.ones((1, 1)), np.ones((1, 1)), B, scaling=1.3, ranknum=1.1)
    pipeline = Pipeline(Arithmetic.strict(io), "A", "io", "blas", "io")
    x, base = np.ones((1, 1)), np.zeros((1, 4096))

    expected = bound_output(x, [a], base, pipeline.arithmetic)
    assert 2 / 3 < ratio(pipeline.output(x, [a], base), expected) <= 1.0


def test_the_sums_of_a_dense_weight_are_charged_to_every_path() -> None:
    """B (A∘E) formed first: its sums over 256 ranks err in one column, where the hidden cancels."""
    lossy, exact = 1 + 2.0**-17 - 2.0**-23, 1 + 2.0**-16  # as terms of a sum of 256
    A = np.tile([lossy, exact], (256, 1))
    a = Adapter(A, np.ones((256, 1)), np.ones((1, 256)), 1.0, 1.0 - 1e-5)
    pipeline = Pipeline(Arithmetic.strict("float32"), "dense", "result", "forward")
    x, base = np.array([[1.0, -1.0]]), np.zeros((1, 1))

    expected = bound_output(x, [a], base, pipeline.arithmetic)
    error = abs(pipeline.output(x, [a], base) - expected.value).item()
    # Were only the hidden vector's sums charged, of two terms, this would exceed the bound.
    assert error > 20 * 2.0**-24 * 2 * 256
    assert error <= expected.bound.item()


@pytest.mark.parametrize("io", FORMATS)
def test_a_dead_adapter_leaves_no_room_for_error(io: str) -> None:
    """E = 0, B = 0, rank 0 or x = 0: the bound is zero, y must be the base's bits."""
    rng = np.random.default_rng(0)
    x, base = round_to(rng.standard_normal((3, 8)), io), round_to(rng.standard_normal((3, 5)), io)
    A, E, B = (round_to(rng.standard_normal(s), "float32") for s in ((2, 8), (2, 1), (5, 2)))

    dead = [
        (x, Adapter(A, 0 * E, B, 1.0, 2.0)),
        (x, Adapter(A, E, 0 * B, 1.0, 2.0)),
        (x, Adapter(A[:0], E[:0], B[:, :0], 1.0, 2.0)),
        (0 * x, Adapter(A, E, B, 1.0, 2.0)),
        (x, Adapter(A, E, B, 1.0, 2.0, keep=np.zeros(x.shape, dtype=bool), p=0.5)),
    ]
    for given, adapter in dead:
        y = bound_output(given, [adapter], base, Arithmetic.permissive(io))
        np.testing.assert_array_equal(y.value, base)
        assert not y.bound.any()


def test_a_dead_rank_leaves_its_gradients_no_room_for_error() -> None:
    """E_j = 0 makes row j of dA and column j of dB exact zeros, but not dE_j."""
    rng = np.random.default_rng(0)
    A, B = rng.standard_normal((2, 6)), rng.standard_normal((4, 2))
    a = Adapter(A, np.array([[1.5], [0.0]]), B, 8.0, 2.0)
    x, g = rng.standard_normal((3, 6)), rng.standard_normal((3, 4))

    _, [leaf] = bound_gradients(x, [a], g, None, Arithmetic.permissive("bfloat16"))
    assert not leaf.dA.bound[1].any()
    assert not leaf.dB.bound[:, 1].any()
    assert leaf.dA.bound[0].all()
    assert leaf.dB.bound[:, 0].all()
    assert leaf.dE.bound.all()


def test_a_dropped_input_gets_the_base_gradient_alone() -> None:
    """Where dropout cut x, dx is the base's, bit for bit."""
    rng = np.random.default_rng(0)
    keep = rng.random((3, 6)) < 0.5
    parts = (rng.standard_normal(s) for s in ((2, 6), (2, 1), (4, 2)))
    a = Adapter(*parts, scaling=8.0, ranknum=2.0, keep=keep, p=0.5)
    x, g, given = (rng.standard_normal(s) for s in ((3, 6), (3, 4), (3, 6)))

    dx, _ = bound_gradients(x, [a], g, given, Arithmetic.strict("float32"))
    np.testing.assert_array_equal(dx.value[~keep], given[~keep])
    assert not dx.bound[~keep].any()
    assert (dx.bound[keep] > 0).all()


def test_one_path_costs_a_few_roundings_however_wide_the_layer() -> None:
    """A one-hot x with one live rank is bounded by 20 roundoffs, in a layer of 4,096 inputs."""
    rng = np.random.default_rng(0)
    x = np.zeros((1, 4096))
    x[0, 77] = 1.0
    A, B = rng.standard_normal((8, 4096)), rng.standard_normal((3, 8))
    a = Adapter(A, np.eye(8)[:, 2:3], B, 16.0, 1.0)

    y = bound_output(x, [a], np.zeros((1, 3)), Arithmetic.strict("float32"))
    assert (y.bound <= 20 * 2.0**-24 * np.abs(y.value)).all()


@pytest.mark.parametrize("lead", [(), (0,), (2, 0), (2, 3)], ids=str)
def test_bounds_have_the_shapes_of_their_values(lead: tuple[int, ...]) -> None:
    """Any leading dimensions, none, or an empty one."""
    rng = np.random.default_rng(0)
    parts = [rng.standard_normal(s) for s in ((2, 6), (2, 1), (4, 2))]
    a = Adapter(*parts, scaling=8.0, ranknum=2.0)
    x, g = rng.standard_normal((*lead, 6)), rng.standard_normal((*lead, 4))

    y = bound_output(x, [a], g, Arithmetic.strict("float16"))
    dx, [leaf] = bound_gradients(x, [a], g, None, Arithmetic.strict("float16"))
    assert y.value.shape == y.bound.shape == (*lead, 4)
    assert dx.value.shape == dx.bound.shape == (*lead, 6)
    assert [part.bound.shape for part in leaf] == [(*lead, 6), (2, 6), (2, 1), (4, 2)]


@pytest.mark.parametrize(("features", "reached"), [(64, 0.94), (512, 0.99)])
def test_who_adds_one_by_one_reaches_the_bound(features: int, reached: float) -> None:
    """1 + 2^-24 + 2^-24 + ...: every addition loses its term, half a unit of the sum's last place."""
    row = np.full(features, 2.0**-24, np.float32)
    row[0] = 1.0
    total = np.float32(0.0)
    for term in row:
        total += term
    adapter = Adapter(row[None].astype(float), np.ones((1, 1)), np.ones((1, 1)), 1.0, 1.0)
    y = total * (np.float32(1.0) / (np.float32(1.0) + np.float32(1e-5)))
    strict = Arithmetic.strict("float32")
    bounded = bound_output(np.ones((1, features)), [adapter], np.zeros((1, 1)), strict)

    assert reached < ratio(np.array([[y]], dtype=float), bounded) < 1.0

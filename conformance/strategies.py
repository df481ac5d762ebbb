"""Where the suite looks for bad cases: strategies that shrink towards rank 1, batch 1, fp32."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TypeVar

from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

from conformance import oracle
from conformance.case import DTYPES, Case, DType, Values
from conformance.spec import Kind

T = TypeVar("T")

# bitsandbytes 0.50.2 dequantises 4-bit weights wrongly on AVX-512 CPUs where in % 16 == 0 and
# in % 64 != 0 (docs/defects). That is the base layer's fault, so no case has such a width.
IN_FEATURES: Sequence[int] = (4, 2, 3, 5, 8, 17, 33, 63, 64, 65, 128, 129, 192, 256)
OUT_FEATURES: Sequence[int] = (3, 1, 2, 4, 8, 16, 17, 33, 64, 65, 130)
BATCHES: Sequence[tuple[int, ...]] = ((1,), (2,), (3,), (5,), (17,), (33,), (2, 3), (3, 1), (1, 17))
RANKS: Sequence[int] = (1, 2, 3, 4, 8, 12, 16, 70)
ALPHAS: Sequence[float] = (3.0, 1.0, 0.5, 8.0, 16.0, 2.75, -1.0)
RANDOM_VALUES: Sequence[Values] = ("gaussian", "lora", "heavy", "cancelling", "onehot", "tiny")


def cases(
    kind: Kind,
    *,
    dtypes: Sequence[DType] = DTYPES,
    values: Sequence[Values] = RANDOM_VALUES,
    adapters: int = 1,
    training: bool | None = True,
    batches: Sequence[tuple[int, ...]] = BATCHES,
    in_features: Sequence[int] = IN_FEATURES,
    bias: bool | None = None,
    ranks: Sequence[int] = RANKS,
) -> SearchStrategy[Case]:
    """Random cases of one kind of layer, with up to `adapters` active adapters.

    `training` and `bias` of None draw both. In eval mode an 8-bit base takes two or three dimensions.
    """

    def settings_of(count: int) -> SearchStrategy[Case]:
        def per_adapter(options: Sequence[T]) -> SearchStrategy[tuple[T, ...]]:
            return st.tuples(*[st.sampled_from(list(options))] * count)

        return st.builds(
            Case,
            kind=st.just(kind),
            dtype=st.sampled_from(list(dtypes)),
            in_features=st.sampled_from(list(in_features)),
            out_features=st.sampled_from(list(OUT_FEATURES)),
            batch=st.sampled_from(list(batches)),
            ranks=per_adapter(ranks),
            alphas=per_adapter(ALPHAS),
            values=st.sampled_from(list(values)),
            # A base output near zero leaves the update's own roundings visible in half precision.
            base_scale=st.sampled_from([1.0, 2.0**-10]),
            bias=st.booleans() if bias is None else st.just(bias),
            training=st.booleans() if training is None else st.just(training),
            quant_type=st.sampled_from(["nf4", "fp4"]),
            double_quant=st.booleans(),
            seed=st.integers(0, 2**16),
        )

    # bitsandbytes takes a 4-bit weight of a single byte for a transposed one, and its backward fails.
    return (
        st.integers(1, adapters)
        .flatmap(settings_of)
        .filter(lambda case: case.in_features * case.out_features > 2)
    )


def probes(
    kind: Kind,
    *,
    dtypes: Sequence[DType] = DTYPES,
    training: bool = True,
    adapters: int = 1,
    seed: int = 0,
) -> Iterator[Case]:
    """The sharp cases of the bounded lane: every profile runs them.

    For each dtype a whiteboard layer, a one-hot one with one live rank, and a wider one whose rank
    differs from alpha, from in and from out; with the base layer's output near zero, and of order one.
    """
    for dtype in dtypes:
        common = Case(kind, dtype, training=training)
        ranks = (3, 5, 2)[:adapters]
        yield replace(common, batch=(2,), ranks=ranks, base_scale=2.0**-10, seed=seed)
        yield replace(
            common,
            in_features=8,
            out_features=5,
            batch=(8,),
            ranks=ranks,
            values="onehot",
            base_scale=2.0**-10,
            seed=seed + 1,
        )
        yield replace(
            common,
            in_features=64,
            out_features=33,
            batch=(2, 3),
            ranks=tuple(r + 5 for r in ranks),
            bias=True,
            seed=seed + 2,
        )
        yield replace(
            common,
            in_features=128,
            out_features=17,
            batch=(5,),
            ranks=tuple(r + 1 for r in ranks),
            values="heavy",
            base_scale=2.0**-10,
            double_quant=True,
            quant_type="fp4",
            seed=seed + 3,
        )


# The powers of two that ranknum + 1e-5 is. The last three are so small that a wrong 1e-5 is a hundredth
# to a twentieth of them, which 8 significant bits show: bf16 sees it in y, and in the gradient of x.
_DIVISORS = ((2, 1, 0), (-1, 0, 4), (0, 4, 3), (4, 3, 2), (3, 2, 1), (-11, -10, -12))
_SMALL_DIVISOR = 5
# fp16 has 11 bits to see it with, and overflows where a port divides by 2**-11 before it scales.
_LARGER_IN_HALF = 3
# Where the rank is also in (last but one), or out and the number of rows (last), E fits a wrong axis.
_DYADIC_SHAPES = (
    (4, 3, (2,), 1),
    (8, 5, (3,), 3),
    (64, 17, (2, 2), 8),
    (65, 4, (5,), 5),
    (17, 33, (4,), 17),
    (8, 3, (3,), 3),
)


def dyadic_cases(
    kind: Kind, *, dtypes: Sequence[DType] = DTYPES, adapters: int = 1, seed: int = 0
) -> Iterator[Case]:
    """The exact lane: 2**k unlike r and unlike alpha, so no wrong divisor gives the same bits.

    What shows where: a wrong factor, sign, axis or broadcast changes every dtype's y and gradients in
    each case. A wrong 1e-5 changes fp32's y, and dA, dE and dB (fp32 in every dtype), in each case;
    y and dx of bf16 and fp16, which round it away elsewhere, in the last.
    """
    for number, (n, m, batch, rank) in enumerate(_DYADIC_SHAPES):
        for dtype in dtypes:
            alphas, divisors = (2.0, 8.0, 0.5), _DIVISORS[number]
            if number == _SMALL_DIVISOR:
                shift = _LARGER_IN_HALF if dtype == "float16" else 0
                alphas = (2.0 ** (shift - 10), 2.0 ** (shift - 12), 2.0 ** (shift - 11))
                divisors = (divisors[0] + shift, divisors[1] + shift, divisors[2] + shift)
            yield Case(
                kind=kind,
                dtype=dtype,
                in_features=n,
                out_features=m,
                batch=batch,
                ranks=(rank, *range(2, adapters + 1))[:adapters],
                alphas=alphas[:adapters],
                ranknums=tuple(map(oracle.exact_ranknum, divisors[:adapters])),
                values="dyadic",
                bias=number % 2 == 1,
                seed=seed + number,
            )

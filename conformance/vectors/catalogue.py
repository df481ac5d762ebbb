"""The vectors that there are, each with the reason why it exists and the clauses that it serves."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import get_args

from conformance.vectors.recipe import AdapterRecipe as Adapter
from conformance.vectors.recipe import BaseKind, DType, QuantiserRecipe, Recipe

__all__ = ["layers", "quantisers"]

DTYPES: tuple[DType, ...] = get_args(DType)
SMALL = 2.0**-10  # A base output near zero leaves the update's own roundings visible in 16 bits.


def layers() -> Iterator[Recipe]:
    """Every layer vector: those of the adapter alone, then those of a quantised base."""
    for dtype in DTYPES:
        for recipe in (*_arithmetic(), *_shapes(), *_scales(), *_several(), *_dropout()):
            yield replace(recipe, dtype=dtype)
        for recipe in _exact():
            yield replace(recipe, dtype=dtype)
    yield from _of_one_dtype()
    for dtype in DTYPES:
        for kind in get_args(BaseKind):
            if kind != "given":
                yield from (replace(r, kind=kind, dtype=dtype) for r in _over(kind))
    yield Recipe(
        "two-levels",
        "nf4-nested",
        "more than 256 blocks: the scales of the scales have a second block",
        in_features=128,
        out_features=130,
        batch=(2,),
        forward=("FWD-4",),
    )


def _arithmetic() -> Iterator[Recipe]:
    """The update and its gradients, the base layer's output given."""
    yield Recipe(
        "whiteboard", "given", "rank 1 on a 4 x 3 layer: small enough to do by hand",
        adapters=(Adapter(r=1),), forward=("FWD-1",),
    )  # fmt: skip
    yield Recipe(
        "ordinary", "given", "everything of order one; rank, alpha and widths all differ",
        in_features=64, out_features=17, batch=(5,), adapters=(Adapter(r=8),), forward=("FWD-1",),
    )  # fmt: skip
    yield Recipe(
        "early-training", "given", "A and B as small as they are initialised, E smaller still",
        in_features=32, out_features=9, batch=(4,), values="lora", base_scale=SMALL,
        adapters=(Adapter(r=4),), forward=("FWD-1",),
    )  # fmt: skip
    yield Recipe(
        "heavy", "given", "an outlier feature 60 times the rest, as transformers have",
        in_features=32, out_features=5, batch=(4,), values="heavy", base_scale=SMALL,
        adapters=(Adapter(r=4),), forward=("FWD-1",),
    )  # fmt: skip
    yield Recipe(
        "cancelling", "given", "pairs of ranks that cancel but for a thousandth",
        in_features=16, out_features=5, batch=(4,), values="cancelling", base_scale=SMALL,
        adapters=(Adapter(r=6),), forward=("FWD-1",),
    )  # fmt: skip
    yield Recipe(
        "tiny", "given", "near the lower end of float16, where a careless cast flushes to zero",
        in_features=16, out_features=5, batch=(4,), values="tiny", base_scale=2.0**-14,
        adapters=(Adapter(r=4),), forward=("FWD-1",),
    )  # fmt: skip
    yield Recipe(
        "one-hot", "given", "x = I and one live rank: each y is a single product, c B E A",
        in_features=8, out_features=5, batch=(8,), values="identity", base_scale=SMALL,
        adapters=(Adapter(r=3, singular="masked"),), forward=("FWD-3",),
    )  # fmt: skip
    yield Recipe(
        "negative", "given", "every singular value is negative: no absolute value, no square root",
        in_features=8, out_features=5, base_scale=SMALL,
        adapters=(Adapter(singular="negative"),), forward=("FWD-7",),
    )  # fmt: skip
    yield Recipe(
        "masked", "given", "pruned ranks: no gradient in A and B, one in E, the scale unchanged",
        in_features=8, out_features=5, base_scale=SMALL,
        adapters=(Adapter(r=5, singular="masked"),), forward=("SCALE-6",), backward=("GRAD-15",),
    )  # fmt: skip


def _shapes() -> Iterator[Recipe]:
    """Shapes at which indexing, tiling and broadcasting go wrong."""
    ragged = (("r-1", 17, 3, 1), ("r-over-in", 3, 5, 8), ("r-over-out", 9, 2, 7), ("65x33", 65, 33, 5),
              ("1x1", 1, 1, 1))  # fmt: skip
    for name, n, m, r in ragged:
        yield Recipe(
            f"ragged-{name}", "given", f"in = {n}, out = {m}, r = {r}: no multiple of a tile",
            in_features=n, out_features=m, batch=(3,), base_scale=SMALL,
            adapters=(Adapter(r=r),), forward=("FWD-17",),
        )  # fmt: skip
    leading: tuple[tuple[int, ...], ...] = ((), (2, 3), (2, 1, 3))
    for batch in leading:
        yield Recipe(
            f"leading-{len(batch)}", "given", f"leading dimensions {batch}", batch=batch,
            base_scale=SMALL, forward=("FWD-8",),
        )  # fmt: skip
    empty: tuple[tuple[int, ...], ...] = ((0,), (2, 0))
    for batch in empty:
        yield Recipe(
            f"empty-{len(batch)}", "given", f"a batch of {batch}: empty y and dx, zero gradients",
            batch=batch, forward=("FWD-9",), backward=("GRAD-18",),
        )  # fmt: skip
    for rows in (17, 33, 65, 129):
        yield Recipe(
            f"rows-{rows}", "given", f"{rows} rows: one more than a tile holds", batch=(rows,),
            adapters=(Adapter(r=2),), base_scale=SMALL, forward=("FWD-16",),
        )  # fmt: skip


def _scales() -> Iterator[Recipe]:
    """The one scalar, scaling / (ranknum + 1e-5)."""
    for alpha in (2.75, 16.0):
        yield Recipe(
            f"alpha-{alpha:g}", "given", f"lora_alpha = {alpha:g} is the scaling, undivided by r",
            base_scale=SMALL, adapters=(Adapter(alpha=alpha),), forward=("SCALE-2",),
        )  # fmt: skip
    for alpha, name in ((0.0, "0"), (-16.0, "negative")):
        yield Recipe(
            f"alpha-{name}", "given", f"lora_alpha = {alpha:g} is not positive: the scaling is r",
            base_scale=SMALL, adapters=(Adapter(r=5, alpha=alpha),), forward=("SCALE-3",),
        )  # fmt: skip
    for ranknum in (6.5, 100.0, 0.375):
        yield Recipe(
            f"ranknum-{ranknum:g}", "given", f"ranknum = {ranknum:g} divides, and not r = 3",
            base_scale=SMALL, adapters=(Adapter(ranknum=ranknum),), forward=("SCALE-4",),
        )  # fmt: skip
    yield Recipe(
        "ranknum-tiny", "given", "ranknum = 2^-13: its 1e-5 weighs 8 %, which every dtype sees",
        in_features=8, out_features=5, batch=(8,), values="identity", base_scale=SMALL,
        adapters=(Adapter(ranknum=2.0**-13, alpha=2.0**-6, singular="masked"),),
        forward=("SCALE-1",),
        only=("y",),
    )  # fmt: skip


def _several() -> Iterator[Recipe]:
    """More adapters than one."""
    yield Recipe(
        "two-adapters", "given", "updates add up, each with its own rank, scaling and ranknum",
        in_features=8, out_features=5, base_scale=SMALL,
        adapters=(Adapter(r=3), Adapter(r=5, alpha=7.0, name="other", ranknum=2.5)),
        forward=("ADPT-1", "SCALE-8"),
    )  # fmt: skip
    yield Recipe(
        "names", "given", "`a` is a part of `ab`: equal ranks, so nothing but the name tells them",
        in_features=8, out_features=5, base_scale=SMALL,
        adapters=(Adapter(name="a"), Adapter(alpha=5.0, name="ab"), Adapter(alpha=7.0, name="b")),
        forward=("ADPT-1", "ADPT-9"), backward=("ADPT-9",),
    )  # fmt: skip
    yield Recipe(
        "inactive", "given", "an adapter that is not active contributes nothing",
        in_features=8, out_features=5, base_scale=SMALL,
        adapters=(Adapter(), Adapter(r=4, alpha=5.0, name="other", active=False)),
        forward=("ADPT-3",), backward=("ADPT-3",),
    )  # fmt: skip


def _dropout() -> Iterator[Recipe]:
    """Dropout with its mask given: where a port draws from is its own affair."""
    for p in (0.1, 0.5):
        yield Recipe(
            f"dropout-{p:g}", "given", f"survivors are scaled by 1 / (1 - {p:g}), back and forth",
            in_features=16, out_features=5, batch=(4,), base_scale=SMALL,
            adapters=(Adapter(p=p),), forward=("DROP-1",), backward=("DROP-3",),
        )  # fmt: skip
    yield Recipe(
        "dropout-each", "given", "each adapter has its own p and its own mask; one has none",
        in_features=16, out_features=5, batch=(2, 2), base_scale=SMALL,
        adapters=(
            Adapter(p=0.25),
            Adapter(r=2, alpha=5.0, name="other", p=0.75),
            Adapter(r=1, alpha=7.0, name="third"),
        ),
        forward=("DROP-10",), backward=("DROP-3",),
    )  # fmt: skip


def _exact() -> Iterator[Recipe]:
    """Dyadic data: no order of evaluation rounds, so a missing 1e-5 cannot hide in noise."""
    shapes = ((4, 3, (2,), 1, 1), (8, 5, (3,), 3, 2), (64, 17, (2, 2), 8, 0), (17, 9, (4,), 17, 4))
    for n, m, batch, r, power in shapes:
        yield Recipe(
            f"exact-{n}x{m}", "given",
            f"every sum is exact: bits, and c = 2 / 2^{power} needs the 1e-5",
            in_features=n, out_features=m, batch=batch, values="dyadic",
            adapters=(Adapter(r=r, alpha=2.0, power=power),),
            forward=("FWD-2", "SCALE-1"), backward=("GRAD-5",),
        )  # fmt: skip
    yield Recipe(
        "fresh", "given", "E = 0, as initialised: y is base(x), and only E has a gradient",
        in_features=8, out_features=5, values="dyadic",
        adapters=(Adapter(alpha=2.0, power=1, singular="zero"),),
        forward=("FWD-5", "INIT-1"), backward=("GRAD-6", "GRAD-7"),
    )  # fmt: skip
    yield Recipe(
        "rank-0", "given", "r = 0, every rank pruned: y is base(x)", in_features=8, out_features=5,
        values="dyadic", adapters=(Adapter(r=0, alpha=2.0, power=1),),
        forward=("FWD-6",), backward=("GRAD-7",),
    )  # fmt: skip


def _of_one_dtype() -> Iterator[Recipe]:
    """Faults that only a narrow format can have."""
    yield Recipe(
        "range", "given", "the numerator leaves float16, 65504; the true y does not: divide first",
        dtype="float16", in_features=8, out_features=5, values="steep",
        adapters=(Adapter(r=1, alpha=1.0, ranknum=32.0),), forward=("DTYPE-4",), only=("y",),
    )  # fmt: skip
    for dtype in ("bfloat16", "float16"):
        yield Recipe(
            "accumulator", "given", "a + 1 + 1 - a is 2 where sums are accumulated in float32",
            dtype=dtype, batch=(1,), values="swamped",
            adapters=(Adapter(r=1, alpha=2.0, power=1),), forward=("DTYPE-8",), only=("y",),
        )  # fmt: skip


def _over(kind: BaseKind) -> Iterator[Recipe]:
    """Layers over one kind of quantised base."""
    serves = {"int8-eval": ("FWD-22",), "int8-outliers": ("FWD-21",)}.get(kind, ("FWD-4",))
    yield Recipe(
        "ordinary", kind, "forward and backward through the quantised weight, one adapter",
        in_features=64, out_features=17, batch=(5,), forward=serves,
    )  # fmt: skip
    yield Recipe(
        "bias", kind, "the bias enters once, and no gradient passes through it",
        in_features=32, out_features=9, batch=(2, 3), bias=True, forward=(*serves, "FWD-18"),
    )  # fmt: skip
    yield Recipe(
        "ragged", kind, "231 elements: a short last block, and half a byte left over",
        in_features=33, out_features=7, batch=(3,), forward=(*serves, "FWD-17"),
    )  # fmt: skip
    if kind in ("nf4", "fp4", "int8-train"):
        yield Recipe(
            "probe", kind, "x = I and no update: y reads the dequantised weight off, element by element",
            in_features=24, out_features=9, batch=(24,), values="identity",
            adapters=(Adapter(r=2, singular="zero"),), forward=serves,
        )  # fmt: skip
    if kind == "nf4":
        yield Recipe(
            "exact", kind, "a ternary weight, exact in nf4: the whole layer to the last bit",
            in_features=64, out_features=9, batch=(3,), values="dyadic", bias=True,
            adapters=(Adapter(r=4, alpha=2.0, power=1),),
            forward=("FWD-2", "SCALE-1"), backward=("GRAD-5",),
        )  # fmt: skip


def quantisers() -> Iterator[QuantiserRecipe]:
    """Weights to be packed; values in the middle of two codes, which round by platform, are left out."""
    for kind in ("nf4", "fp4"):
        yield QuantiserRecipe("blocks", kind, "whole blocks of 64, several to a row", (5, 128))
        yield QuantiserRecipe(
            "ragged", kind, "231 elements: a short block and half a byte", (7, 33)
        )
        yield QuantiserRecipe("one", kind, "a single element", (1, 1))
        yield QuantiserRecipe("zeros", kind, "a block of zeros among others", (3, 64))
    yield QuantiserRecipe(
        "scales", "nested", "300 scales: a full block of 256 and a short one", (1, 300)
    )
    yield QuantiserRecipe("rows", "int8", "rows of very different size, and one of zeros", (6, 33))

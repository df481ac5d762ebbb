"""What is measured: one scenario for each combination of layer, dtype, size and use."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from itertools import product
from typing import Any, Literal, get_args

import torch

from conformance.spec import KINDS, Kind

Arithmetic = Literal["float32", "bfloat16", "float16", "autocast"]
Mode = Literal["forward", "step"]
SHORT: dict[str, str] = {
    "float32": "fp32",
    "bfloat16": "bf16",
    "float16": "fp16",
    "autocast": "autocast",
}


@dataclass(frozen=True)
class Scenario:
    """One experiment, the same for every layer that is measured.

    dtype: of x; "autocast" is an fp32 x under bf16 autocast.
    mode: "step" is forward and backward in training; "forward" is evaluation without a graph.
    masked: 3/4 of E zero, measured beside the same layer with none of it zero.
    repack: leaves bitsandbytes free to repack the 4-bit weight at its first evaluation on a CPU
        with AVX512-BF16, as it does unless it is kept from it. A port that evaluates from packed
        copies on request is measured both ways.
    """

    kind: Kind = "4bit"
    dtype: Arithmetic = "bfloat16"
    tokens: int = 512
    in_features: int = 1024
    out_features: int = 1024
    rank: int = 8
    dropout: float = 0.0
    adapters: int = 1
    checkpoint: bool = False
    masked: bool = False
    mode: Mode = "step"
    repack: bool = False

    @property
    def id(self) -> str:
        """A short name, unique in a grid."""
        told = [
            self.kind,
            SHORT[self.dtype],
            f"{self.tokens}x{self.in_features}x{self.out_features}",
            f"r{self.rank}",
            self.mode,
        ]
        told += [f"dropout{self.dropout:g}"] if self.dropout else []
        told += [f"{self.adapters}adapters"] if self.adapters > 1 else []
        told += [name for name in ("checkpoint", "masked", "repack") if asdict(self)[name]]
        return "-".join(told)

    @property
    def x_dtype(self) -> torch.dtype:
        """The dtype of x and, where the base layer keeps it, of y."""
        return torch.float32 if self.dtype == "autocast" else self.product_dtype

    @property
    def product_dtype(self) -> torch.dtype:
        """The dtype of the base layer's arithmetic."""
        given = "bfloat16" if self.dtype == "autocast" else self.dtype
        found: torch.dtype = getattr(torch, given)
        return found

    @property
    def live_rank(self) -> int:
        """Ranks of an adapter whose E is not zero."""
        return self.rank - 3 * self.rank // 4 if self.masked else self.rank

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def default_grid() -> tuple[Scenario, ...]:
    """Seven to nine minutes on two cores: the targets' sizes, and every dimension once."""
    halves_and_full: tuple[Arithmetic, ...] = ("bfloat16", "float32")
    found: list[Scenario] = []
    for dtype in halves_and_full:
        for size, tokens in ((1024, 512), (1024, 2048), (2048, 512), (4096, 512)):
            found.append(_square(size, dtype=dtype, tokens=tokens))
        found += [Scenario(dtype=dtype, tokens=tokens, dropout=0.1) for tokens in (512, 2048)]
        found += [Scenario(dtype=dtype, tokens=2048, rank=64, masked=m) for m in (False, True)]
        found += [
            _square(size, dtype=dtype, tokens=tokens, mode="forward", repack=repack)
            for repack in (False, True)
            for size, tokens in ((1024, 1), (1024, 16), (4096, 1), (4096, 16))
        ]
        found += [_square(1024, dtype=dtype, tokens=t) for t in (1, 16)]
        found += [Scenario(kind="8bit", dtype=dtype, tokens=t) for t in (512, 2048)]
        found.append(Scenario(kind="8bit", dtype=dtype, tokens=16, mode="forward"))
        found.append(Scenario(dtype=dtype, adapters=3))
        found.append(Scenario(dtype=dtype, checkpoint=True))
    found += [Scenario(dtype="autocast", tokens=t) for t in (512, 2048)]
    found += [Scenario(dtype="autocast", tokens=t, mode="forward") for t in (1, 16)]
    found += [Scenario(dtype="float16", tokens=16, mode=mode) for mode in get_args(Mode)]
    found.append(Scenario(out_features=11008, in_features=4096))
    return tuple(found)


def full_grid() -> tuple[Scenario, ...]:
    """Every combination that means something: hours on two cores."""
    shapes = ((1024, 1024), (2048, 2048), (4096, 4096), (4096, 11008))
    found = []
    for kind, dtype, (n_in, n_out), tokens, rank, adapters in product(
        KINDS, get_args(Arithmetic), shapes, (1, 16, 512, 2048), (8, 64), (1, 3)
    ):
        same: dict[str, Any] = {
            "kind": kind,
            "dtype": dtype,
            "in_features": n_in,
            "out_features": n_out,
            "tokens": tokens,
            "rank": rank,
            "adapters": adapters,
        }
        # In evaluation there is neither dropout nor a graph to keep.
        found.append(Scenario(**same, mode="forward"))
        if kind == "4bit":
            found.append(Scenario(**same, mode="forward", repack=True))
        for dropout, checkpoint in product((0.0, 0.1), (False, True)):
            found.append(Scenario(**same, dropout=dropout, checkpoint=checkpoint))
        if rank == 64 and adapters == 1:
            found.append(Scenario(**same, masked=True))
    return tuple(found)


GRIDS = {"default": default_grid, "full": full_grid}


def narrowed(grid: Iterable[Scenario], wanted: Sequence[str]) -> tuple[Scenario, ...]:
    """The scenarios that meet all of `FIELD=VALUE[,VALUE...]`.

    Raises:
        ValueError: for what is not a field of a scenario, or a value that it cannot have.
    """
    chosen = tuple(grid)
    for text in wanted:
        name, _, values = text.partition("=")
        allowed = {_read(name, value) for value in values.split(",")}
        chosen = tuple(s for s in chosen if getattr(s, name) in allowed)
    return chosen


def _read(name: str, value: str) -> Any:
    types: dict[str, type] = {f.name: type(f.default) for f in fields(Scenario)}
    if name not in types or not value:
        raise ValueError(
            f"`{name}={value}`: give FIELD=VALUE, with FIELD one of {', '.join(types)}."
        )
    if types[name] is bool:
        if value not in ("yes", "no"):
            raise ValueError(f"`{name}={value}`: `{name}` is yes or no.")
        return value == "yes"
    try:
        return types[name](value)
    except ValueError:
        raise ValueError(f"`{name}={value}`: `{name}` is a {types[name].__name__}.") from None


def _square(size: int, **given: Any) -> Scenario:
    return Scenario(in_features=size, out_features=size, **given)

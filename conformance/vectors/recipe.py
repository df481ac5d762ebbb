"""What decides a golden vector, before any number is drawn."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

__all__ = ["TENSOR_DTYPES", "AdapterRecipe", "BaseKind", "DType", "QuantiserRecipe", "Recipe"]

DType = Literal["float32", "bfloat16", "float16"]
TENSOR_DTYPES: dict[DType, str] = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}

# "given": the base layer's output is part of the vector, so that the adapter alone is judged.
BaseKind = Literal[
    "given", "nf4", "fp4", "nf4-nested", "fp4-nested", "int8-train", "int8-eval", "int8-outliers"
]
Values = Literal[
    "bell",
    "lora",
    "heavy",
    "cancelling",
    "tiny",
    "identity",
    "dyadic",
    "steep",
    "swamped",
]
Singular = Literal["mixed", "negative", "zero", "masked"]


@dataclass(frozen=True)
class AdapterRecipe:
    """One adapter. `power` makes ranknum + 1e-5 the power of two 2^power, in place of `ranknum`."""

    r: int = 3
    alpha: float = 3.0
    name: str = "default"
    ranknum: float | None = None
    power: int | None = None
    p: float = 0.0
    singular: Singular = "mixed"
    active: bool = True


@dataclass(frozen=True)
class Recipe:
    """A layer: forward and backward, of one dtype.

    reason: why the vector exists. forward, backward: clauses that its y, and its gradients, serve.
    only: the outputs that are asked for, all of them if it is empty.
    """

    name: str
    kind: BaseKind
    reason: str
    dtype: DType = "float32"
    in_features: int = 4
    out_features: int = 3
    batch: tuple[int, ...] = (2,)
    adapters: tuple[AdapterRecipe, ...] = (AdapterRecipe(),)
    values: Values = "bell"
    base_scale: float = 1.0
    bias: bool = False
    forward: tuple[str, ...] = ()
    backward: tuple[str, ...] = ()
    only: tuple[str, ...] = ()

    @property
    def id(self) -> str:
        return f"{self.kind}-{self.dtype}-{self.name}"

    @property
    def exact(self) -> bool:
        """Whether the bits of y and of its gradients are demanded, not a bound."""
        return self.values in ("dyadic", "swamped")


@dataclass(frozen=True)
class QuantiserRecipe:
    """A weight on its way in: packed codes and scales, bit for bit."""

    name: str
    kind: Literal["nf4", "fp4", "nested", "int8"]
    reason: str
    shape: tuple[int, int] = (4, 64)

    @property
    def id(self) -> str:
        return f"quantise-{self.kind}-{self.name}"

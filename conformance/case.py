"""A case: everything that decides one experiment, small enough to print, to shrink and to run again."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import nn

from conformance.spec import Kind

DType = Literal["float32", "bfloat16", "float16"]
Values = Literal["gaussian", "lora", "heavy", "cancelling", "tiny", "onehot", "dyadic", "real"]
DTYPES: tuple[DType, ...] = get_args(DType)
TORCH_DTYPES: dict[DType, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
ADAPTER_NAMES = ("default", "other", "third")
# Unlike each other, unlike 1, and unlike any rank of the probes: alpha / r never equals alpha.
DEFAULT_ALPHAS = (3.0, 5.0, 7.0)


@dataclass(frozen=True)
class Case:
    """One experiment. Arrays follow from `seed` and `values`, so a case prints in a line."""

    kind: Kind
    dtype: DType = "float32"
    in_features: int = 4
    out_features: int = 3
    batch: tuple[int, ...] = (1,)
    ranks: tuple[int, ...] = (1,)
    alphas: tuple[float, ...] = ()
    ranknums: tuple[float, ...] = ()
    dropouts: tuple[float, ...] = ()
    values: Values = "gaussian"
    base_scale: float = 1.0
    bias: bool = False
    training: bool = True
    quant_type: Literal["nf4", "fp4"] = "nf4"
    double_quant: bool = False
    compute_dtype: DType | None = None
    threshold: float = 0.0
    seed: int = 0

    def alpha(self, index: int) -> float:
        return self.alphas[index] if self.alphas else DEFAULT_ALPHAS[index]

    def ranknum(self, index: int) -> float:
        return self.ranknums[index] if self.ranknums else float(self.ranks[index])

    def dropout(self, index: int) -> float:
        return self.dropouts[index] if self.dropouts else 0.0

    @property
    def names(self) -> tuple[str, ...]:
        return ADAPTER_NAMES[: len(self.ranks)]

    @property
    def torch_dtype(self) -> torch.dtype:
        return TORCH_DTYPES[self.dtype]

    def to_json(self) -> str:
        """The fields that differ from their defaults, in one line for `--case`."""
        given = asdict(self)
        shown = {
            f.name: given[f.name]
            for f in fields(self)
            if f.name == "kind" or given[f.name] != f.default
        }
        return json.dumps(shown, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> Case:
        """Read a case that `to_json` wrote.

        Raises:
            ValueError: when it is not JSON, or names a field that a case does not have.
        """
        given: dict[str, Any] = json.loads(text)
        unknown = set(given) - {f.name for f in fields(cls)}
        if unknown or "kind" not in given:
            raise ValueError(
                f"Not a case: {text!r} (unknown: {sorted(unknown)}; `kind` is needed)."
            )
        fields_given: dict[str, Any] = {
            k: tuple(v) if isinstance(v, list) else v for k, v in given.items()
        }
        return cls(**fields_given)

    def __str__(self) -> str:
        quantised = (
            f" {self.quant_type}{'+dq' if self.double_quant else ''}" if self.kind == "4bit" else ""
        )
        extras = [
            f"{name}={value}"
            for name, value, default in (
                ("alphas", self.alphas, ()),
                ("ranknums", self.ranknums, ()),
                ("dropouts", self.dropouts, ()),
                ("base_scale", self.base_scale, 1.0),
                ("bias", self.bias, False),
                ("compute_dtype", self.compute_dtype, None),
                ("threshold", self.threshold, 0.0),
            )
            if value != default
        ]
        rank = ",".join(map(str, self.ranks))
        return " ".join(
            [
                f"{self.kind}{quantised} {self.dtype} in={self.in_features} out={self.out_features}",
                f"batch={'x'.join(map(str, self.batch)) or 'none'} r={rank} {self.values}",
                "train" if self.training else "eval",
                *extras,
                f"seed={self.seed}",
            ]
        )


@dataclass(frozen=True)
class AdapterValues:
    """A (r, in), E (r, 1), B (out, r): float64 arrays whose values are exact in fp32."""

    A: np.ndarray
    E: np.ndarray
    B: np.ndarray


@dataclass(frozen=True)
class Data:
    """The arrays of a case, float64, each exact in the dtype that the layer gets it in.

    weight (out, in), bias (out,) or None, x (*batch, in), dout (*batch, out).
    """

    weight: np.ndarray
    bias: np.ndarray | None
    x: np.ndarray
    dout: np.ndarray
    adapters: tuple[AdapterValues, ...]


def as_dtype(values: np.ndarray, dtype: torch.dtype) -> torch.Tensor:
    """The nearest values in `dtype`, on the CPU."""
    return torch.from_numpy(np.ascontiguousarray(values, dtype=np.float64)).to(dtype)


def exact(values: np.ndarray, dtype: torch.dtype) -> np.ndarray:
    """The values rounded to `dtype`, in float64: what a layer that is given them really sees."""
    return as_float64(as_dtype(values, dtype))


def as_float64(tensor: torch.Tensor) -> np.ndarray:
    """A tensor's values in float64 on the CPU; every dtype of a case converts exactly."""
    array: np.ndarray = tensor.detach().to("cpu", torch.float64).numpy()
    return array


def build_base(
    case: Case, data: Data, device: torch.device, *, repackable: bool = False
) -> nn.Module:
    """A fresh, frozen, quantised base layer with the data's weight and bias.

    Fresh for every experiment, because bitsandbytes' layers keep state: a half-precision call
    rounds the bias for good, and the first call latches `compute_dtype`. On a CPU with AVX512-BF16 an
    eval forward of `Linear4bit` would also repack the weight and change the arithmetic to bf16;
    `repackable` leaves that on, for the clauses that ask whether a port survives it.
    """
    # Here, since it takes seconds: who only asks others has no use for it.
    from bitsandbytes.nn import Linear4bit, Linear8bitLt

    dtype = case.torch_dtype
    shape = (case.in_features, case.out_features)
    base: Linear4bit | Linear8bitLt
    if case.kind == "4bit":
        base = Linear4bit(
            *shape,
            bias=case.bias,
            compute_dtype=TORCH_DTYPES[case.compute_dtype or case.dtype],
            compress_statistics=case.double_quant,
            quant_type=case.quant_type,
        )
        if not repackable:
            base.support_avx512bf16_for_cpu = False
    else:
        base = Linear8bitLt(
            *shape, bias=case.bias, has_fp16_weights=False, threshold=case.threshold
        )
    with torch.no_grad():
        # The weight arrives in the model's dtype, as `from_pretrained(dtype=...)` delivers it.
        base.weight.data = as_dtype(data.weight, dtype)
        if base.bias is not None and data.bias is not None:
            base.bias.data = as_dtype(data.bias, dtype)
    base.requires_grad_(False)
    moved: nn.Module = base.to(device)
    return moved.train(case.training)

"""Tensors in safetensors files, bfloat16 too, by NumPy alone; what is read is checked first.

Files are written here, byte by byte, so that they are the same whatever release of the library is
installed. They are read by the library; nothing is ever unpickled.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, deserialize

from conformance.vectors.truth import round_to

__all__ = ["DTYPES", "FLOATS", "Tensor", "TensorFileError", "read_tensors", "write_tensors"]

# safetensors' names of what vectors are made of. BF16 is kept as the bits that it is stored in.
DTYPES: Mapping[str, np.dtype[Any]] = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype("<u2"),
    "U8": np.dtype("u1"),
    "I8": np.dtype("i1"),
}
FLOATS: Mapping[str, str] = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
}
# Far above any honest file, and small enough to be read whole.
LARGEST_FILE = 2**28


class TensorFileError(Exception):
    """A file that is not what it should be: the message says which key, and what is wrong."""


@dataclass(frozen=True)
class Tensor:
    """An array as stored. `dtype` is safetensors' name; `bits` has the dtype that `DTYPES` gives it."""

    dtype: str
    bits: NDArray[Any]

    @classmethod
    def of(cls, values: NDArray[Any], dtype: str) -> Tensor:
        """Values that the dtype holds exactly.

        Raises:
            ValueError: when one of them it does not.
        """
        if dtype == "BF16":
            single = np.ascontiguousarray(values, dtype=np.float32).reshape(np.shape(values))
            stored = (single.view(np.uint32) >> np.uint32(16)).astype("<u2")
        else:
            stored = np.ascontiguousarray(values).astype(DTYPES[dtype]).reshape(np.shape(values))
        tensor = cls(dtype, stored)
        if not np.array_equal(tensor.values, np.asarray(values, dtype=np.float64)):
            raise ValueError(f"{dtype} does not hold these values exactly.")
        return tensor

    @classmethod
    def rounded(cls, values: NDArray[Any], dtype: str) -> Tensor:
        """The nearest values that a floating dtype holds."""
        return cls.of(round_to(values, FLOATS[dtype]) if dtype != "F64" else values, dtype)

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.bits.shape)

    @property
    def values(self) -> NDArray[np.float64]:
        """What the bits stand for, in float64, exactly."""
        if self.dtype == "BF16":
            wide = self.bits.astype(np.uint32) << np.uint32(16)
            return np.asarray(wide.view(np.float32), dtype=np.float64)
        with np.errstate(invalid="ignore"):  # a signalling NaN is a NaN
            return np.asarray(self.bits, dtype=np.float64)


def write_tensors(tensors: Mapping[str, Tensor]) -> bytes:
    """The bytes of a safetensors file: keys sorted, the header padded so that data start at 8."""
    header: dict[str, Any] = {}
    chunks: list[bytes] = []
    offset = 0
    # Widest first, so that every tensor is aligned to its own width.
    for key in sorted(tensors, key=lambda k: (-DTYPES[tensors[k].dtype].itemsize, k)):
        tensor = tensors[key]
        data = tensor.bits.tobytes()
        span = [offset, offset + len(data)]
        header[key] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": span}
        chunks.append(data)
        offset += len(data)
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=True).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + b"".join(chunks)


def read_tensors(data: bytes) -> dict[str, Tensor]:
    """The tensors of a safetensors file.

    Raises:
        TensorFileError: when it is malformed, truncated, or has trailing bytes, a key twice or a
            dtype that no vector uses.
    """
    try:
        entries = deserialize(data)  # type: ignore[no-untyped-call]
    except SafetensorError as error:
        raise TensorFileError(f"it is not a safetensors file ({error})") from None
    _refuse_duplicates(data)
    found: dict[str, Tensor] = {}
    for key, entry in sorted(entries, key=lambda pair: str(pair[0])):
        dtype, shape = entry["dtype"], tuple(entry["shape"])
        if dtype not in DTYPES:
            known = ", ".join(DTYPES)
            raise TensorFileError(f"key {key!r} has dtype {dtype}; use one of {known}")
        raw = bytes(entry["data"])
        if len(raw) != prod(shape) * DTYPES[dtype].itemsize:
            raise TensorFileError(f"key {key!r} has {len(raw)} bytes for shape {shape} of {dtype}")
        found[key] = Tensor(dtype, np.frombuffer(raw, dtype=DTYPES[dtype]).reshape(shape))
    return found


def _refuse_duplicates(data: bytes) -> None:
    """The library keeps one of two equal keys; which of them was meant is not ours to guess."""

    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        seen: dict[str, Any] = {}
        for key, value in items:
            if key in seen:
                raise TensorFileError(f"key {key!r} stands in it twice")
            seen[key] = value
        return seen

    size = int.from_bytes(data[:8], "little")
    try:
        json.loads(data[8 : 8 + size].decode("utf-8"), object_pairs_hook=pairs)
    except (ValueError, RecursionError) as error:
        raise TensorFileError(f"its header is not JSON ({error})") from None

"""An AdaLoRA layer over quantised weights in plain NumPy, and how it answers the golden vectors.

    python -m conformance.vectors write vectors
    python examples/numpy_port/port.py vectors outputs.safetensors
    python -m conformance.vectors check vectors outputs.safetensors --arithmetic float32

It knows nothing of this project but docs/vectors.md. All its arithmetic is float32, the one rounding to the
input's dtype comes last.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import deserialize

Array = np.ndarray
Tensors = dict[str, Array]

# --- tensors: bfloat16 is the upper half of a float32 --------------------------------------------


def load(path: Path) -> Tensors:
    """The tensors of a file; bfloat16 and float16 become float32, which holds them exactly."""
    kinds = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2", "U8": "u1", "I8": "i1"}
    tensors = {}
    for key, entry in deserialize(path.read_bytes()):
        array = np.frombuffer(entry["data"], kinds[entry["dtype"]]).reshape(entry["shape"])
        if entry["dtype"] == "BF16":
            array = (array.astype(np.uint32) << 16).view(np.float32)
        tensors[key] = array.astype(np.float32) if entry["dtype"] == "F16" else array
    return tensors


def to_bfloat16(values: Array) -> Array:
    """The upper halves of float32 values, to nearest, ties to even."""
    bits = np.ascontiguousarray(values, np.float32).reshape(values.shape).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype("<u2")


def save(path: Path, tensors: dict[str, tuple[str, Array]]) -> None:
    """A safetensors file: the header's length, the header as JSON, the bytes of all tensors."""
    header, chunks, offset = {}, [], 0
    for key, (dtype, values) in tensors.items():
        kinds = {"F32": "<f4", "F16": "<f2", "U8": "u1", "I8": "i1"}
        stored = to_bfloat16(values) if dtype == "BF16" else values.astype(kinds[dtype])
        chunks.append(stored.tobytes())
        span = [offset, offset := offset + stored.nbytes]
        header[key] = {"dtype": dtype, "shape": list(stored.shape), "data_offsets": span}
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + b"".join(chunks))


# --- the quantised base layer --------------------------------------------------------------------


def weight_4bit(t: Tensors, books: Tensors, v: dict[str, Any]) -> Array:
    """W (out, in): each code of a byte, high nibble first, times the scale of its block."""
    book = books["codebooks/" + v["kind"][:3]]
    nibbles = np.stack([t["packed"] >> 4, t["packed"] & 15], axis=1).ravel()
    if "absmax" in t:
        absmax = t["absmax"]
    else:
        outer = np.repeat(t["absmax_absmax"], 256)[: t["absmax_codes"].size]
        absmax = books["codebooks/dynamic"][t["absmax_codes"]] * outer + t["absmax_offset"]
    size = v["out_features"] * v["in_features"]
    scales = np.repeat(absmax, v["blocksize"])[:size]
    return (book[nibbles[:size]] * scales).reshape(v["out_features"], v["in_features"])


def int8_product(x: Array, t: Tensors, threshold: float) -> Array:
    """x (rows, in) quantised by rows times CB, and the columns with outliers as they are; (rows, out)."""
    half = x.astype(np.float16).astype(np.float32)
    outliers = (np.abs(half) >= threshold).any(axis=0) if threshold else np.zeros(x.shape[1], bool)
    kept = np.where(outliers, 0, half)
    scale = np.abs(kept).max(axis=1, keepdims=True)
    codes = np.rint(kept * (127 / scale)).astype(np.int32)
    y = (codes @ t["CB"].T.astype(np.int32)) * (scale * t["SCB"]) / np.float32(127 * 127)
    return y + x[:, outliers] @ (t["CB"] * t["SCB"][:, None] / np.float32(127))[:, outliers].T


# --- the adapter ---------------------------------------------------------------------------------


class Adapter:
    """delta(x) = dropout(x) @ (A * E).T @ B.T * scaling / (ranknum + 1e-5)."""

    def __init__(self, spec: dict[str, Any], t: Tensors) -> None:
        self.A, self.E, self.B = (t[f"{spec['name']}/{n}"] for n in "AEB")
        scaling = spec["lora_alpha"] if spec["lora_alpha"] > 0 else spec["r"]
        self.c = np.float32(scaling) / (np.float32(spec["ranknum"]) + np.float32(1e-5))
        keep = t.get(f"{spec['name']}/keep")
        self.keep = (
            1
            if keep is None
            else keep.reshape(-1, keep.shape[-1]) / np.float32(1 - spec["dropout"])
        )

    def forward(self, x: Array) -> Array:
        """x (rows, in) to delta (rows, out)."""
        self.x = x * self.keep
        self.h = self.x @ (self.A * self.E).T
        return self.h @ self.B.T * self.c

    def backward(self, dy: Array) -> tuple[Array, Array, Array, Array]:
        """dy (rows, out) to dx (rows, in), dA (r, in), dE (r, 1), dB (out, r)."""
        dh = dy @ self.B * self.c
        dfolded = dh.T @ self.x
        dx = dh @ (self.A * self.E) * self.keep
        dA = dfolded * self.E
        dE = (dfolded * self.A).sum(axis=1, keepdims=True)
        dB = dy.T @ self.h * self.c
        return dx, dA, dE, dB


# --- the vectors ---------------------------------------------------------------------------------


def layer(v: dict[str, Any], t: Tensors, books: Tensors) -> dict[str, Array]:
    """Everything that one layer vector asks for."""
    x = t["x"].reshape(-1, v["in_features"])
    dy = t["dout"].reshape(-1, v["out_features"])
    out: dict[str, Array] = {}
    if v["kind"] == "given":
        y, dx = t["base"].reshape(dy.shape), t["base_dx"].reshape(x.shape)
    else:
        if v["kind"].startswith("int8"):
            W = t["CB"] * (t["SCB"][:, None] / np.float32(127))
        else:
            W = weight_4bit(t, books, v)
        quantised = v["kind"] in ("int8-eval", "int8-outliers")
        y = int8_product(x, t, v["threshold"]) if quantised else x @ W.T
        y, dx = y + t.get("bias", np.float32(0)), dy @ W
        out["W"] = W
    for spec in v["adapters"]:
        if spec["active"]:
            adapter = Adapter(spec, t)
            y = y + adapter.forward(x)
            adapter_dx, *leaves = adapter.backward(dy)
            dx = dx + adapter_dx
            out |= {
                f"{spec['name']}/{n}": g for n, g in zip(("dA", "dE", "dB"), leaves, strict=True)
            }
    return out | {"y": y.reshape(t["dout"].shape), "dx": dx.reshape(t["x"].shape)}


def quantise(v: dict[str, Any], t: Tensors, books: Tensors) -> dict[str, Array]:
    """The codes and scales that one quantiser vector asks for."""
    if v["kind"] == "quantise-int8":
        scale = np.abs(t["weight"]).max(axis=1)
        safe = np.where(scale > 0, scale, 1)[:, None]
        return {"CB": np.rint(t["weight"] * (127 / safe)), "SCB": scale}
    nested = v["kind"] == "quantise-nested"
    values = (t["absmax"] - t["absmax_offset"] if nested else t["weight"]).ravel()
    starts = np.arange(0, values.size, v["blocksize"])
    absmax = np.maximum.reduceat(np.abs(values), starts)
    scaled = values / np.repeat(np.where(absmax > 0, absmax, 1), v["blocksize"])[: values.size]
    book = books["codebooks/" + ("dynamic" if nested else v["kind"][-3:])]
    codes = np.abs(scaled[:, None] - book).argmin(axis=1)
    if nested:
        return {"absmax_codes": codes, "absmax_absmax": absmax}
    padded = np.append(codes, np.abs(book).argmin()) if codes.size % 2 else codes
    return {"packed": padded[::2] << 4 | padded[1::2], "absmax": absmax}


def main(vectors: Path, outputs: Path) -> None:
    index = json.loads((vectors / "index.json").read_text())
    inputs = load(vectors / index["files"]["inputs"]["name"])
    answers = {}
    for v in index["vectors"]:
        tensors = {name: inputs[key] for name, key in v["inputs"].items()}
        answer = (quantise if v["kind"].startswith("quantise") else layer)(v, tensors, inputs)
        for asked in v["outputs"]:
            name = asked["key"].removeprefix(v["id"] + "/")
            answers[asked["key"]] = (asked["dtype"], answer[name])
    save(outputs, answers)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))

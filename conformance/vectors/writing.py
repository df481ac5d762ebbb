"""`write`: all vectors of a seed, as two safetensors files and an index."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from conformance import __version__
from conformance.clauses import spec_version
from conformance.vectors import catalogue
from conformance.vectors.index import INDEX, VectorsError, render
from conformance.vectors.made import MadeOutput, MadeVector
from conformance.vectors.making import make_layer
from conformance.vectors.quantising import make_quantiser
from conformance.vectors.tensors import Tensor, write_tensors
from conformance.vectors.truth import codebook, dynamic_map

__all__ = ["EXPECTED", "FORMAT_VERSION", "INPUTS", "contents_of", "make_all", "write_vectors"]

FORMAT_VERSION = 1
INPUTS, EXPECTED = "inputs.safetensors", "expected.safetensors"


def make_all(seed: int) -> Iterator[MadeVector]:
    """Every vector of the catalogue."""
    for quantiser in catalogue.quantisers():
        yield make_quantiser(quantiser, seed)
    for layer in catalogue.layers():
        yield make_layer(layer, seed)


def write_vectors(folder: Path, seed: int = 0) -> list[Path]:
    """Write the vectors into `folder`, which is made if need be; the same bytes for the same seed.

    Raises:
        VectorsError: when the folder holds anything but an earlier set, or cannot be written.
    """
    files = {INPUTS, EXPECTED, INDEX}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        others = sorted({entry.name for entry in folder.iterdir()} - files)
        if others:
            raise VectorsError(f"{folder}: it holds {others[0]!r}; choose a folder of its own.")
        contents = contents_of(make_all(seed), seed)
        for name, data in contents.items():
            (folder / name).write_bytes(data)
    except ValueError as error:
        raise VectorsError(f"--seed {seed}: {error} Choose another seed.") from None
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise VectorsError(f"{folder}: it cannot be written ({reason}).") from None
    return [folder / name for name in contents]


def contents_of(vectors: Iterable[MadeVector], seed: int) -> dict[str, bytes]:
    """The bytes of each file, the index last, for vectors that were made with a seed."""
    inputs: dict[str, Tensor] = {
        "codebooks/nf4": Tensor.of(codebook("nf4"), "F32"),
        "codebooks/fp4": Tensor.of(codebook("fp4"), "F32"),
        "codebooks/dynamic": Tensor.of(dynamic_map(), "F32"),
    }
    expected: dict[str, Tensor] = {}
    entries = []
    for vector in vectors:
        inputs |= {f"{vector.id}/{name}": tensor for name, tensor in vector.inputs.items()}
        for output in vector.outputs:
            key = f"{vector.id}/{output.name}"
            expected[key] = output.expected
            for bound_key, values in _bound_tensors(key, output).items():
                expected[bound_key] = Tensor.of(values, "F64")
        entries.append(_entry(vector))
    contents = {INPUTS: write_tensors(inputs), EXPECTED: write_tensors(expected)}
    document = {
        "format": "qsvd-vectors",
        "format_version": FORMAT_VERSION,
        "suite_version": __version__,
        "spec_version": spec_version(),
        "seed": seed,
        "files": {
            role: {
                "name": name,
                "bytes": len(contents[name]),
                "sha256": hashlib.sha256(contents[name]).hexdigest(),
            }
            for role, name in (("inputs", INPUTS), ("expected", EXPECTED))
        },
        "vectors": entries,
    }
    return {**contents, INDEX: render(document).encode()}


def _bound_keys(key: str, output: MadeOutput) -> dict[str, str] | None:
    """The keys of the bounds: one, where both arithmetics have the same."""
    if output.bounds is None:
        return None
    first, *others = output.bounds.values()
    if all(np.array_equal(first, other) for other in others):
        return dict.fromkeys(output.bounds, f"{key}.bound")
    return {claim: f"{key}.bound.{claim}" for claim in output.bounds}


def _bound_tensors(key: str, output: MadeOutput) -> dict[str, np.ndarray]:
    keys = _bound_keys(key, output)
    if keys is None or output.bounds is None:
        return {}
    return {keys[claim]: values for claim, values in output.bounds.items()}


def _entry(vector: MadeVector) -> dict[str, Any]:
    """The vector's entry in the index."""
    return {
        "id": vector.id,
        "kind": vector.kind,
        "reason": vector.reason,
        "clauses": sorted({c for o in vector.outputs for c in (*o.clauses, o.dtype_clause)}),
        **vector.about,
        "inputs": {name: f"{vector.id}/{name}" for name in vector.inputs},
        "outputs": [
            {
                "key": f"{vector.id}/{output.name}",
                "dtype": output.dtype,
                "shape": list(output.expected.shape),
                "clauses": list(output.clauses),
                "dtype_clause": output.dtype_clause,
                "bounds": _bound_keys(f"{vector.id}/{output.name}", output),
            }
            for output in vector.outputs
        ],
    }

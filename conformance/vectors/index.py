"""The index of a set of vectors: one JSON file that says what stands in the safetensors files.

`conformance/schemas/vectors.schema.json` publishes its form. The index carries the size and SHA-256 of
each file, and a digest of itself: nothing that was changed since it was written is believed.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jsonschema import Draft202012Validator

from conformance.clauses import clauses, spec_version

__all__ = ["INDEX", "Index", "Output", "Vector", "VectorsError", "read_index", "render"]

INDEX = "index.json"
SCHEMA = Path(__file__).parents[1] / "schemas" / "vectors.schema.json"
LARGEST_INDEX = 2**24
Bounds = dict[str, str]


class VectorsError(Exception):
    """The vectors themselves cannot be used: the message names the file, and what to do."""


@dataclass(frozen=True)
class Output:
    """What a port must give under `key`. bounds: keys of the expected file, or None for its bits."""

    key: str
    dtype: str
    shape: tuple[int, ...]
    clauses: tuple[str, ...]
    dtype_clause: str
    bounds: Bounds | None


@dataclass(frozen=True)
class Vector:
    """One entry."""

    id: str
    kind: str
    dtype: str | None
    reason: str
    outputs: tuple[Output, ...]


@dataclass(frozen=True)
class Index:
    """What a checker needs of an index. files: the name, size and SHA-256 of each, by its role."""

    seed: int
    digest: str
    files: dict[str, dict[str, Any]]
    vectors: tuple[Vector, ...]


def digest_of(document: dict[str, Any]) -> str:
    """SHA-256 of the document without its `digest`, in the form in which it is written."""
    rest = {key: value for key, value in document.items() if key != "digest"}
    return hashlib.sha256(_text(rest).encode()).hexdigest()


def render(document: dict[str, Any]) -> str:
    """The text of index.json: the document, sealed with its digest."""
    return _text({**document, "digest": digest_of(document)})


def _text(document: dict[str, Any]) -> str:
    return json.dumps(document, indent=1, sort_keys=True, ensure_ascii=True, allow_nan=False) + "\n"


def read_index(path: Path) -> Index:
    """The index, if it is as it was written.

    Raises:
        VectorsError: when it is not JSON, does not fit its schema, names an unknown clause or a vector
            or key twice, belongs to another specification, or was changed.
    """
    document = _load(path)
    _validate(path, document)
    if render(document) != _bytes(path).decode("utf-8"):
        raise VectorsError(f"{path}: it was changed since it was written; {_AGAIN}")
    if document["spec_version"] != spec_version():
        raise VectorsError(
            f"{path}: these vectors are for specification {document['spec_version']}, "
            f"this is {spec_version()}; {_AGAIN}"
        )
    vectors = tuple(_vector(entry) for entry in document["vectors"])
    _refuse_repeated(path, vectors)
    for vector in vectors:
        for output in vector.outputs:
            for clause in (*output.clauses, output.dtype_clause):
                if clause not in clauses():
                    raise VectorsError(
                        f"{path}: {output.key} serves {clause}, which SPEC.md lacks."
                    )
    return Index(document["seed"], document["digest"], document["files"], vectors)


_AGAIN = "write them again with `python -m conformance.vectors write`."


def _bytes(path: Path) -> bytes:
    try:
        if path.stat().st_size > LARGEST_INDEX:
            raise VectorsError(f"{path}: {path.stat().st_size} bytes is no index of vectors.")
        return path.read_bytes()
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise VectorsError(f"{path}: it cannot be read ({reason}); {_AGAIN}") from None


def _load(path: Path) -> dict[str, Any]:
    try:
        document = json.loads(_bytes(path).decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise VectorsError(f"{path}: it is not JSON ({error}); {_AGAIN}") from None
    if not isinstance(document, dict):
        raise VectorsError(f"{path}: it is a {type(document).__name__}, not an object; {_AGAIN}")
    return document


def _validate(path: Path, document: dict[str, Any]) -> None:
    schema = json.loads(SCHEMA.read_text(encoding="utf-8"))
    errors = sorted(Draft202012Validator(schema).iter_errors(document), key=lambda e: e.json_path)
    if errors:
        first = errors[0]
        what = first.message if len(first.message) <= 200 else first.message[:200] + "..."
        raise VectorsError(
            f"{path}: {first.json_path} does not fit vectors.schema.json: {what}; {_AGAIN}"
        )


def _vector(entry: dict[str, Any]) -> Vector:
    return Vector(
        id=entry["id"],
        kind=entry["kind"],
        dtype=entry.get("dtype"),
        reason=entry["reason"],
        outputs=tuple(
            Output(
                key=o["key"],
                dtype=o["dtype"],
                shape=tuple(o["shape"]),
                clauses=tuple(o["clauses"]),
                dtype_clause=o["dtype_clause"],
                bounds=o["bounds"],
            )
            for o in entry["outputs"]
        ),
    )


def _refuse_repeated(path: Path, vectors: tuple[Vector, ...]) -> None:
    seen: set[str] = set()
    for name in [v.id for v in vectors] + [o.key for v in vectors for o in v.outputs]:
        if name in seen:
            raise VectorsError(f"{path}: {name!r} stands in it twice; {_AGAIN}")
        seen.add(name)

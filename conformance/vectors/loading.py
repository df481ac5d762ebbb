"""Reading what `check` is given: a set of vectors that is as it was written, and a port's outputs."""

from __future__ import annotations

import hashlib
import stat
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from conformance.vectors.index import INDEX, Index, Output, VectorsError, read_index
from conformance.vectors.tensors import LARGEST_FILE, Tensor, TensorFileError, read_tensors

__all__ = ["Outputs", "OutputsError", "VectorSet", "load_outputs", "load_vectors"]

SUFFIX = ".safetensors"


class OutputsError(Exception):
    """A port's outputs cannot be read: the message names the file, the key, and what is wrong."""


@dataclass(frozen=True)
class VectorSet:
    """An index, and the tensors of its expected file, all of which it accounts for."""

    folder: Path
    index: Index
    expected: dict[str, Tensor]


@dataclass(frozen=True)
class Outputs:
    """tensors: by key. files: the file that each key came from. hashes: SHA-256 by file name."""

    tensors: dict[str, Tensor]
    files: dict[str, Path]
    hashes: dict[str, str]


def load_vectors(folder: Path) -> VectorSet:
    """The vectors in a folder.

    Raises:
        VectorsError: when a file is missing, unexpected, a link or changed, or lacks a tensor.
    """
    if not folder.is_dir():
        raise VectorsError(f"{folder}: there is no such folder of vectors.")
    index = read_index(folder / INDEX)
    names = {role: str(entry["name"]) for role, entry in index.files.items()}
    if len(set(names.values())) != len(names):
        raise VectorsError(f"{folder / INDEX}: it names {names['inputs']} for inputs and expected.")
    strangers = sorted({entry.name for entry in folder.iterdir()} - {INDEX, *names.values()})
    if strangers:
        raise VectorsError(
            f"{folder / strangers[0]}: the index does not name it; keep outputs and notes elsewhere."
        )
    contents = {role: _verified(folder / name, index, role) for role, name in names.items()}
    tensors = {}
    for role, data in contents.items():
        try:
            tensors[role] = read_tensors(data)
        except TensorFileError as error:
            raise VectorsError(f"{folder / names[role]}: {error}.") from None
    _require_complete(folder / names["expected"], index, tensors["expected"])
    return VectorSet(folder, index, tensors["expected"])


def _verified(path: Path, index: Index, role: str) -> bytes:
    """The bytes of a file of the set, if they are those that the index was written for."""
    try:
        data = _read(path)
    except OutputsError as error:
        raise VectorsError(str(error)) from None
    entry = index.files[role]
    if len(data) != entry["bytes"]:
        raise VectorsError(f"{path}: it has {len(data)} bytes, the index says {entry['bytes']}.")
    if hashlib.sha256(data).hexdigest() != entry["sha256"]:
        raise VectorsError(f"{path}: its SHA-256 is not the index's: it was changed or is another.")
    return data


def _require_complete(path: Path, index: Index, expected: dict[str, Tensor]) -> None:
    """Exactly the tensors that the index speaks of, each finite and of its output's shape."""
    wanted: dict[str, Output] = {}
    for output in (o for v in index.vectors for o in v.outputs):
        wanted |= dict.fromkeys((output.key, *(output.bounds or {}).values()), output)
    for key in sorted(wanted.keys() ^ expected.keys()):
        what = "is missing" if key in wanted else "is in no vector"
        raise VectorsError(f"{path}: key {key!r} {what}.")
    for key, tensor in expected.items():
        if tensor.shape != wanted[key].shape:
            raise VectorsError(f"{path}: key {key!r} has shape {tensor.shape}, not the index's.")
        if not np.isfinite(tensor.values).all() or (
            key != wanted[key].key and (tensor.values < 0).any()
        ):
            raise VectorsError(f"{path}: key {key!r} has a value that no vector has.")


def load_outputs(path: Path, vectors: VectorSet) -> Outputs:
    """A port's outputs: a safetensors file, or a folder of them and nothing else.

    Raises:
        OutputsError: when there are none, a file is not readable as safetensors, is one of the
            vectors' own, or a key stands in two of them.
    """
    if path.resolve().is_relative_to(vectors.folder.resolve()):
        raise OutputsError(
            f"{path}: that is the vectors' own folder, not what a port made of them."
        )
    own = {str(entry["sha256"]): str(entry["name"]) for entry in vectors.index.files.values()}
    tensors: dict[str, Tensor] = {}
    files: dict[str, Path] = {}
    hashes: dict[str, str] = {}
    for file in _files(path):
        data = _read(file)
        hashes[file.name] = hashlib.sha256(data).hexdigest()
        if hashes[file.name] in own:
            raise OutputsError(f"{file}: it is the vectors' own {own[hashes[file.name]]}.")
        try:
            found = read_tensors(data)
        except TensorFileError as error:
            raise OutputsError(f"{file}: {error}.") from None
        for key, tensor in found.items():
            if key in files:
                raise OutputsError(f"{file}: key {key!r} stands in {files[key].name}, too.")
            tensors[key], files[key] = tensor, file
    return Outputs(tensors, files, hashes)


def _files(path: Path) -> list[Path]:
    """The files that hold outputs."""
    if not path.is_dir():
        return [path]
    entries = sorted(path.iterdir())
    for entry in entries:
        if entry.suffix != SUFFIX:
            raise OutputsError(f"{entry}: only {SUFFIX} files belong into a folder of outputs.")
    if not entries:
        raise OutputsError(f"{path}: it is empty; a port that gives nothing has not passed.")
    return entries


def _read(path: Path) -> bytes:
    """A regular file's bytes; a link, a pipe or a folder is not followed, awaited or entered."""
    try:
        status = path.lstat()
        if not stat.S_ISREG(status.st_mode):
            raise OutputsError(f"{path}: it is not a regular file.")
        if status.st_size > LARGEST_FILE:
            raise OutputsError(f"{path}: {status.st_size} bytes are more than any port's outputs.")
        return path.read_bytes()
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise OutputsError(f"{path}: it cannot be read ({reason}).") from None

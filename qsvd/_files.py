"""Writing the two files of an adapter so that a reader finds the old pair or the new one, whole.

Each file is written beside its place, flushed to the disk, and renamed into it, which is atomic. Between
the two renames a killed process leaves new tensors and an old configuration. The tensors therefore
carry the hash of the configuration that belongs to them, and the new configuration, complete, waits
under its other name: `read_pair` takes that one if the hash says so.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from safetensors import SafetensorError, safe_open

from qsvd._config import CONFIG_NAME

WEIGHTS_NAME = "adapter_model.safetensors"
CONFIG_HASH = "qsvd_config_sha256"  # in the metadata of the weights' file
_WAITING = ".new"


def config_hash(config: bytes) -> str:
    """What the weights' metadata holds under `CONFIG_HASH`."""
    return hashlib.sha256(config).hexdigest()


def write_pair(folder: Path, weights: bytes, config: bytes) -> None:
    """Put both files in place; the folder is made if it is not there."""
    folder.mkdir(parents=True, exist_ok=True)
    waiting = {name: folder / (name + _WAITING) for name in (WEIGHTS_NAME, CONFIG_NAME)}
    _write_through(waiting[CONFIG_NAME], config)
    _write_through(waiting[WEIGHTS_NAME], weights)
    os.replace(waiting[WEIGHTS_NAME], folder / WEIGHTS_NAME)
    os.replace(waiting[CONFIG_NAME], folder / CONFIG_NAME)
    _sync_folder(folder)


def read_pair(folder: Path) -> tuple[Path, bytes]:
    """The weights' path, and the configuration that belongs to them.

    Raises:
        FileNotFoundError: if one of the two is not there, saying what is.
        ValueError: if the weights are not a safetensors file, or not all of one.
    """
    weights = folder / WEIGHTS_NAME
    if not weights.is_file():
        others = sorted(p.name for p in folder.glob("adapter_model.*")) if folder.is_dir() else []
        pickled = " Files that would have to be unpickled are not read." if others else ""
        raise FileNotFoundError(f"{folder} has no {WEIGHTS_NAME}; found {others}.{pickled}")
    try:
        with safe_open(weights, framework="np") as file:
            expected = (file.metadata() or {}).get(CONFIG_HASH)
    except SafetensorError as error:
        raise ValueError(f"{weights} is no safetensors file, or not all of it: {error}.") from None
    waiting, place = folder / (CONFIG_NAME + _WAITING), folder / CONFIG_NAME
    if expected is not None and waiting.is_file():
        content = waiting.read_bytes()
        if config_hash(content) == expected:  # a save was killed between its two renames
            return weights, content
    if not place.is_file():
        raise FileNotFoundError(f"{folder} has no {CONFIG_NAME}.")
    return weights, place.read_bytes()


def _write_through(path: Path, content: bytes) -> None:
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    """Let the renames reach the disk, where a folder can be opened for that."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

"""One set of vectors, and one port's outputs, for all tests: both are read and never written."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from conformance.vectors.loading import VectorSet, load_vectors
from conformance.vectors.writing import contents_of, make_all, write_vectors

ROOT = Path(__file__).parents[2]
PORT = ROOT / "examples" / "numpy_port" / "port.py"
SMALL = {
    "quantise-nf4-ragged",
    "given-float32-ordinary",
    "given-float32-exact-4x3",
    "given-float32-empty-1",
    "given-bfloat16-ordinary",
    "nf4-float16-bias",
    "int8-outliers-float32-bias",
}


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The vectors of seed 0."""
    written = tmp_path_factory.mktemp("vectors") / "set"
    write_vectors(written)
    return written


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A few vectors of each sort, for tests that read a set again and again."""
    written = tmp_path_factory.mktemp("small") / "set"
    written.mkdir()
    chosen = (v for v in make_all(0) if v.id in SMALL)
    for name, data in contents_of(chosen, 0).items():
        (written / name).write_bytes(data)
    return written


@pytest.fixture(scope="session")
def small_honest(small: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the example's port makes of the few."""
    outputs = tmp_path_factory.mktemp("small-honest") / "outputs.safetensors"
    subprocess.run([sys.executable, "-W", "error", PORT, small, outputs], check=True)
    return outputs


@pytest.fixture(scope="session")
def vectors(folder: Path) -> VectorSet:
    return load_vectors(folder)


@pytest.fixture(scope="session")
def honest(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the example's port makes of them, in a process that imports it alone."""
    outputs = tmp_path_factory.mktemp("honest") / "outputs.safetensors"
    subprocess.run([sys.executable, "-W", "error", PORT, folder, outputs], check=True)
    return outputs

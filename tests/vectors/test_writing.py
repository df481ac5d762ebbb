"""The vectors themselves: true, complete, explained, small, and the same everywhere."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from jsonschema import Draft202012Validator

from conformance.clauses import clauses
from conformance.vectors import catalogue
from conformance.vectors.index import SCHEMA, VectorsError
from conformance.vectors.loading import VectorSet
from conformance.vectors.making import make_layer, rounded_up
from conformance.vectors.tensors import Tensor, read_tensors, write_tensors
from conformance.vectors.writing import write_vectors
from reference import Adapter, backward, forward
from tests.vectors.conftest import ROOT

# Machines differ in the order in which BLAS and NumPy sum: kernels, threads, vector widths.
MACHINES = (
    {"OPENBLAS_CORETYPE": "Prescott", "OPENBLAS_NUM_THREADS": "1"},
    {
        "OPENBLAS_CORETYPE": "Haswell",
        "OPENBLAS_NUM_THREADS": "2",
        "PYTHONHASHSEED": "7",
        "NPY_DISABLE_CPU_FEATURES": "X86_V4 AVX512F AVX512CD AVX512_SKX X86_V3 AVX2 FMA3",
    },
)


def test_they_are_small(folder: Path) -> None:
    assert sum(file.stat().st_size for file in folder.iterdir()) < 5e6


def test_the_index_fits_its_published_schema(folder: Path) -> None:
    schema = json.loads(SCHEMA.read_text())
    Draft202012Validator.check_schema(schema)
    Draft202012Validator(schema).validate(json.loads((folder / "index.json").read_text()))


@pytest.mark.parametrize("machine", MACHINES, ids=lambda m: next(iter(m.values())))
def test_every_machine_writes_the_same_bytes(
    folder: Path, tmp_path: Path, machine: dict[str, str]
) -> None:
    command = [sys.executable, "-m", "conformance.vectors", "write", tmp_path / "again"]
    environment = {k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"} | machine
    subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True)

    for file in folder.iterdir():
        assert (tmp_path / "again" / file.name).read_bytes() == file.read_bytes(), file.name


def test_bounds_have_twelve_bits() -> None:
    """So the last bits of their making, which depend on the machine, have no say in them."""
    recipe = next(r for r in catalogue.layers() if r.name == "ordinary")
    for output in make_layer(recipe, 0).outputs:
        for bound in (output.bounds or {}).values():
            step = np.ldexp(1.0, np.frexp(bound)[1] - 12)
            assert np.array_equal(bound, np.rint(bound / step) * step)


def test_rounding_up_never_lowers_a_bound_and_hardly_raises_it() -> None:
    bound = np.array([0.0, 1.0, 1e-38, 5e-42, 3.0000001, 1e300])
    raised = rounded_up(bound)
    assert (raised >= bound).all()
    assert (raised <= bound * (1 + 6e-4)).all()


def test_another_seed_gives_other_numbers_and_the_same_vectors() -> None:
    recipe = next(r for r in catalogue.layers() if r.name == "ordinary")
    first, second = make_layer(recipe, 0), make_layer(recipe, 1)
    assert [o.name for o in first.outputs] == [o.name for o in second.outputs]
    for name, tensor in first.inputs.items():
        assert not np.array_equal(tensor.bits, second.inputs[name].bits), name


def test_every_seed_has_its_certificates_and_its_domain() -> None:
    """Making raises where a bit is not determined or a value may leave its format's range."""
    for seed in (1, 10):  # 10: a sum too long for bfloat16, drawn again
        for recipe in catalogue.layers():
            if recipe.values in ("dyadic", "heavy", "tiny") or recipe.kind == "int8-outliers":
                make_layer(recipe, seed)


def test_every_vector_says_why_and_which_clauses(folder: Path) -> None:
    entries = json.loads((folder / "index.json").read_text())["vectors"]
    for entry in entries:
        assert len(entry["reason"]) > 15
        assert set(entry["clauses"]) <= set(clauses())
    assert len({entry["id"] for entry in entries}) == len(entries)


def test_every_kind_comes_in_every_dtype(folder: Path) -> None:
    entries = json.loads((folder / "index.json").read_text())["vectors"]
    found = {(e["kind"], e["dtype"]) for e in entries if "dtype" in e}
    assert len({kind for kind, _ in found}) == 8
    assert len(found) == 8 * 3


def test_the_chapters_that_vectors_can_serve_are_served(vectors: VectorSet) -> None:
    served = {c for v in vectors.index.vectors for o in v.outputs for c in o.clauses}
    for clause in (
        *(f"FWD-{n}" for n in (1, 2, 3, 4, 5, 6, 7, 8, 9, 16, 17, 18, 21, 22)),
        *(f"GRAD-{n}" for n in (1, 2, 3, 4, 5, 6, 7, 15, 18)),
        *(f"SCALE-{n}" for n in (1, 2, 3, 4, 6, 8)),
        *("DROP-1", "DROP-3", "DROP-10", "ADPT-1", "ADPT-3", "ADPT-9", "DTYPE-4", "DTYPE-8"),
    ):
        assert clause in served


def test_true_values_are_the_reference_in_float64(folder: Path, vectors: VectorSet) -> None:
    """Read back from the files, with BLAS, in another order: equal to a few float64 roundings."""
    inputs = read_tensors((folder / "inputs.safetensors").read_bytes())
    compared = 0
    for entry in json.loads((folder / "index.json").read_text())["vectors"]:
        if (
            entry["kind"] != "given"
            or "exact" in entry["id"]
            or not entry["id"].endswith("ordinary")
        ):
            continue
        t = {name: inputs[key].values for name, key in entry["inputs"].items()}
        (spec,) = entry["adapters"]
        adapter = Adapter(
            t["default/A"], t["default/E"], t["default/B"], spec["lora_alpha"], spec["ranknum"]
        )
        delta, cache = forward(t["x"], adapter)
        gradients = backward(t["dout"], cache)
        wanted = {
            "y": t["base"] + delta,
            "dx": t["base_dx"] + gradients.dx,
            "default/dA": gradients.dA,
            "default/dE": gradients.dE,
            "default/dB": gradients.dB,
        }
        for name, value in wanted.items():
            stored = vectors.expected[f"{entry['id']}/{name}"].values
            np.testing.assert_allclose(stored, value, rtol=1e-12, atol=1e-13)
            compared += stored.size
    assert compared > 1000


def test_the_index_carries_each_files_hash(folder: Path) -> None:
    files = json.loads((folder / "index.json").read_text())["files"]
    for entry in files.values():
        data = (folder / entry["name"]).read_bytes()
        assert hashlib.sha256(data).hexdigest() == entry["sha256"]


def test_a_folder_with_other_things_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("unsaved")
    with pytest.raises(VectorsError, match=r"it holds 'thesis.txt'; choose a folder of its own"):
        write_vectors(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize("dtype", ["F64", "F32", "F16", "BF16", "U8", "I8"])
def test_tensors_survive_their_file(dtype: str) -> None:
    for shape in ((), (0,), (3,), (2, 0, 3), (2, 3)):
        values = np.arange(np.prod(shape, dtype=int)).reshape(shape) + 1
        tensor = Tensor.of(values, dtype)
        (found,) = read_tensors(write_tensors({"a/b": tensor})).values()
        assert (found.dtype, found.shape) == (dtype, shape)
        assert np.array_equal(found.values, values)


def test_the_library_reads_what_is_written() -> None:
    from safetensors.numpy import load

    tensors = {"x": Tensor.of(np.eye(3), "F32"), "n": Tensor.of(np.arange(5), "U8")}
    found = load(write_tensors(tensors))
    assert np.array_equal(found["x"], np.eye(3, dtype=np.float32))
    assert np.array_equal(found["n"], np.arange(5))


def test_a_value_that_the_dtype_lacks_is_refused() -> None:
    with pytest.raises(ValueError, match="BF16 does not hold these values exactly"):
        Tensor.of(np.array([1.0 + 2.0**-20]), "BF16")

"""What `check` says: a verdict with clause ids, and an error with file and key, never a pass."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from jsonschema import Draft202012Validator

from conformance.vectors.__main__ import FAILED, PASSED, UNUSABLE, main
from conformance.vectors.index import INDEX, render
from conformance.vectors.loading import load_vectors
from conformance.vectors.tensors import Tensor, read_tensors, write_tensors
from tests.vectors.conftest import ROOT

Y = "given-float32-ordinary/y"
BF16_Y = "given-bfloat16-ordinary/y"
Tensors = dict[str, Tensor]
CAPTURE = pytest.CaptureFixture[str]


@pytest.fixture
def tensors(small_honest: Path) -> Tensors:
    """An honest port's outputs, to be spoilt."""
    return read_tensors(small_honest.read_bytes())


def check(folder: Path, tensors: Tensors | bytes, tmp_path: Path, *arguments: str) -> int:
    """The exit code for these outputs."""
    outputs = tmp_path / "outputs.safetensors"
    outputs.write_bytes(tensors if isinstance(tensors, bytes) else write_tensors(tensors))
    return main(["check", str(folder), str(outputs), *arguments])


def changed(tensor: Tensor, change: Callable[[np.ndarray], object]) -> Tensor:
    bits = tensor.bits.copy()
    change(bits)
    return Tensor(tensor.dtype, bits)


def test_an_honest_port_passes(folder: Path, honest: Path, capsys: CAPTURE) -> None:
    for claim in ("input", "float32"):
        assert main(["check", str(folder), str(honest), "--arithmetic", claim]) == PASSED
    assert "The outputs conform on all" in capsys.readouterr().out


def test_outputs_may_be_split_over_files(small: Path, tensors: Tensors, tmp_path: Path) -> None:
    keys = sorted(tensors)
    outputs = tmp_path / "outputs"
    outputs.mkdir()
    (outputs / "a.safetensors").write_bytes(write_tensors({k: tensors[k] for k in keys[::2]}))
    (outputs / "b.safetensors").write_bytes(write_tensors({k: tensors[k] for k in keys[1::2]}))
    assert main(["check", str(small), str(outputs)]) == PASSED


def test_an_element_over_its_bound_names_everything(
    small: Path, tensors: Tensors, tmp_path: Path, capsys: CAPTURE
) -> None:
    tensors[Y] = changed(tensors[Y], lambda bits: bits.__setitem__((2, 3), bits[2, 3] + 1e-3))

    assert check(small, tensors, tmp_path) == FAILED
    shown = capsys.readouterr().out
    assert f"outputs.safetensors: {Y}[2, 3] is off by" in shown
    assert "times the bound): got" in shown
    assert "1 of 85 elements are off" in shown
    assert "FWD-1 MUST: Given the base output" in shown


def test_an_error_within_the_bound_passes_and_one_beyond_it_fails(
    small: Path, tensors: Tensors, tmp_path: Path
) -> None:
    """The bound itself decides: 0.98 of it is accepted, 1.02 of it is not, in each element's place."""
    vectors = load_vectors(small)
    expected, bound = vectors.expected[Y].values, vectors.expected[f"{Y}.bound"].values
    for factor, verdict in ((0.9, PASSED), (1.2, FAILED)):
        # F64 holds what float32 could not; its dtype breaks DTYPE-1 alone, and so the exit code.
        tensors[Y] = Tensor.of(expected + factor * bound, "F64")
        path = tmp_path / f"{factor}.json"
        assert check(small, tensors, tmp_path, "--json", str(path)) == FAILED
        status = {c["id"]: c["status"] for c in json.loads(path.read_text())["clauses"]}
        assert status["DTYPE-1"] == "fail"
        assert status["FWD-1"] == ("pass" if verdict == PASSED else "fail")


def test_a_nan_never_passes(small: Path, tensors: Tensors, tmp_path: Path, capsys: CAPTURE) -> None:
    for key in (Y, BF16_Y, "given-float32-exact-4x3/y"):
        spoilt = dict(tensors)
        nan = np.full(tensors[key].shape, np.nan)
        bits = Tensor.of(np.zeros(nan.shape), tensors[key].dtype).bits
        bits = nan.astype(np.float32) if key == Y else np.full_like(bits, 0x7FC0)
        if tensors[key].dtype == "F32":
            bits = nan.astype(np.float32)
        spoilt[key] = Tensor(tensors[key].dtype, bits)
        assert check(small, spoilt, tmp_path) == FAILED
        assert f"{key}[" in capsys.readouterr().out


def test_a_wrong_float_dtype_is_blamed_once(small: Path, tensors: Tensors, tmp_path: Path) -> None:
    tensors[BF16_Y] = Tensor.of(tensors[BF16_Y].values, "F32")
    report = tmp_path / "verdict.json"
    assert check(small, tensors, tmp_path, "--json", str(report)) == FAILED
    failed = [c["id"] for c in json.loads(report.read_text())["clauses"] if c["status"] == "fail"]
    assert failed == ["DTYPE-1"]


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda t: t.pop(Y), f"key '{Y}' is missing"),
        (lambda t: t.update({Y: Tensor.of(np.zeros((85,)), "F32")}), f"{Y} has shape (85,)"),
        (lambda t: t.update({Y: Tensor.of(np.zeros((5, 17)), "I8")}), f"{Y} has dtype I8"),
        (lambda t: t.update({"extra/y": t[Y]}), "no vector has key 'extra/y'"),
        (lambda t: t.update({f"{Y}.bound": t[Y]}), "no vector has key"),
    ],
)
def test_what_is_missing_or_misshapen_fails(
    small: Path,
    tensors: Tensors,
    tmp_path: Path,
    capsys: CAPTURE,
    spoil: Callable[[Tensors], object],
    message: str,
) -> None:
    spoil(tensors)
    assert check(small, tensors, tmp_path) == FAILED
    shown = capsys.readouterr().out
    assert message in shown
    assert "outputs.safetensors" in shown


def test_an_empty_output_fails(small: Path, tmp_path: Path) -> None:
    assert check(small, {}, tmp_path) == FAILED


def twice(data: bytes) -> bytes:
    """The same file, in whose header the first key stands twice."""
    size = int.from_bytes(data[:8], "little")
    header = data[8 : 8 + size].rstrip()
    first = header[1 : header.index(b"}") + 1]
    text = b"{" + first + b"," + header[1:]
    return len(text).to_bytes(8, "little") + text + data[8 + size :]


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda data: b"", "it is not a safetensors file"),
        (lambda data: data[: len(data) // 2], "it is not a safetensors file"),
        (lambda data: data[:-1], "it is not a safetensors file"),
        (lambda data: data + b"\0", "it is not a safetensors file"),
        (lambda data: b"\x80\x04cos\nsystem\n", "it is not a safetensors file"),
        (twice, "stands in it twice"),
    ],
)
def test_a_malformed_file_is_an_error_that_names_it(
    small: Path,
    tensors: Tensors,
    tmp_path: Path,
    capsys: CAPTURE,
    spoil: Callable[[bytes], bytes],
    message: str,
) -> None:
    assert check(small, spoil(write_tensors(tensors)), tmp_path) == UNUSABLE
    error = capsys.readouterr().err
    assert message in error
    assert "outputs.safetensors" in error


def test_outputs_that_are_no_outputs_are_refused(
    small: Path, small_honest: Path, tmp_path: Path, capsys: CAPTURE
) -> None:
    empty, mixed, copied = tmp_path / "empty", tmp_path / "mixed", tmp_path / "copy.safetensors"
    empty.mkdir()
    mixed.mkdir()
    (mixed / "notes.txt").write_text("")
    double = tmp_path / "double"
    double.mkdir()
    for name in ("a.safetensors", "b.safetensors"):
        shutil.copy(small_honest, double / name)
    link = tmp_path / "link.safetensors"
    link.symlink_to(small_honest)
    shutil.copy(small / "expected.safetensors", copied)
    for outputs, message in (
        (tmp_path / "nothing", "it cannot be read (No such file or directory)"),
        (empty, "it is empty"),
        (mixed, "only .safetensors files belong"),
        (double, "stands in a.safetensors, too"),
        (link, "it is not a regular file"),
        (copied, "it is the vectors' own expected.safetensors"),
        (small, "the vectors' own folder"),
        (small / "expected.safetensors", "the vectors' own folder"),
    ):
        assert main(["check", str(small), str(outputs)]) == UNUSABLE
        error = capsys.readouterr().err
        assert message in error
        assert str(outputs) in error


def spoil_index(folder: Path, change: Callable[[dict], object], seal: bool = True) -> None:
    """Change the index, and seal it again unless the seal is what is asked about."""
    path = folder / INDEX
    document = json.loads(path.read_text())
    change(document)
    path.write_text(render(document) if seal else json.dumps(document))


INDEX_FAULTS: list[tuple[Callable[[dict], object], str]] = [
    (lambda d: d.pop("vectors"), "'vectors' is a required property"),
    (lambda d: d.update(vectors=[]), "$.vectors"),
    (lambda d: d["vectors"][1].update(dtype="F8"), "'F8' is not one of"),
    (lambda d: d["vectors"][1].pop("reason"), "'reason' is a required property"),
    (lambda d: d["files"]["inputs"].update(name="../inputs.safetensors"), "does not match"),
    (lambda d: d["files"]["inputs"].update(name="/etc/passwd"), "does not match"),
    (lambda d: d["vectors"][1]["outputs"][0].update(key="../y"), "does not match"),
    (lambda d: d["files"]["expected"].update(name="inputs.safetensors"), "for inputs and expected"),
    (lambda d: d["files"]["expected"].update(sha256="0" * 64), "its SHA-256 is not the index's"),
    (lambda d: d["files"]["expected"].update(bytes=7), "bytes, the index says 7"),
    (
        lambda d: d["files"]["expected"].update(name="other.safetensors"),
        "the index does not name it",
    ),
    (lambda d: d["vectors"].append(d["vectors"][3]), "stands in it twice"),
    (lambda d: d["vectors"].pop(), "is in no vector"),
    (lambda d: d["vectors"][1]["outputs"][0].update(clauses=["FWD-999"]), "which SPEC.md lacks"),
    (lambda d: d["vectors"][1]["outputs"][0].update(shape=[1]), "has shape"),
    (lambda d: d.update(spec_version="0.1"), "these vectors are for specification 0.1"),
]


@pytest.mark.parametrize(("change", "message"), INDEX_FAULTS)
def test_an_index_that_is_wrong_is_an_error(
    small: Path,
    small_honest: Path,
    tmp_path: Path,
    capsys: CAPTURE,
    change: Callable[[dict], object],
    message: str,
) -> None:
    shutil.copytree(small, tmp_path / "set")
    spoil_index(tmp_path / "set", change)
    assert main(["check", str(tmp_path / "set"), str(small_honest)]) == UNUSABLE
    error = capsys.readouterr().err
    assert message in error
    assert str(tmp_path / "set") in error


def test_a_change_of_the_vectors_is_noticed(
    small: Path, small_honest: Path, tmp_path: Path, capsys: CAPTURE
) -> None:
    """An index whose seal is broken, a byte of a file, a stranger, a link in a file's place."""

    def stranger(copy: Path) -> None:
        (copy / "notes.txt").write_text("")

    def flipped(copy: Path) -> None:
        data = bytearray((copy / "expected.safetensors").read_bytes())
        data[-1] ^= 1
        (copy / "expected.safetensors").write_bytes(data)

    def linked(copy: Path) -> None:
        (copy / "inputs.safetensors").rename(tmp_path / "elsewhere")
        (copy / "inputs.safetensors").symlink_to(tmp_path / "elsewhere")

    def reseeded(copy: Path) -> None:
        spoil_index(copy, lambda d: d.update(seed=5), seal=False)

    def missing(copy: Path) -> None:
        (copy / "expected.safetensors").unlink()

    for number, (spoil, message) in enumerate(
        (
            (stranger, "the index does not name it"),
            (flipped, "its SHA-256 is not the index's"),
            (linked, "it is not a regular file"),
            (reseeded, "it was changed since it was written"),
            (missing, "it cannot be read (No such file or directory)"),
        )
    ):
        copy = tmp_path / str(number)
        shutil.copytree(small, copy)
        spoil(copy)
        assert main(["check", str(copy), str(small_honest)]) == UNUSABLE
        assert message in capsys.readouterr().err


def test_json_fits_its_published_schema(small: Path, tensors: Tensors, tmp_path: Path) -> None:
    schema = json.loads((ROOT / "conformance/schemas/vectors-verdict.schema.json").read_text())
    Draft202012Validator.check_schema(schema)
    report = tmp_path / "verdict.json"
    for spoilt in (tensors, {k: t for k, t in tensors.items() if k != Y} | {"a/b": tensors[Y]}):
        check(small, spoilt, tmp_path, "--json", str(report))
        verdict = json.loads(report.read_text())
        Draft202012Validator(schema).validate(verdict)
        assert verdict["passed"] == (spoilt is tensors)


def test_json_is_not_written_over_what_is_read(
    small: Path, small_honest: Path, capsys: CAPTURE
) -> None:
    for path in (small / "verdict.json", small_honest):
        assert main(["check", str(small), str(small_honest), "--json", str(path)]) == UNUSABLE
        assert "choose another place" in capsys.readouterr().err


def test_a_part_may_be_asked_and_the_verdict_says_so(
    small: Path, tensors: Tensors, tmp_path: Path, capsys: CAPTURE
) -> None:
    """A port without 16-bit types is asked for float32, and not told that it conforms to the rest."""
    part = {k: t for k, t in tensors.items() if "given-float32" in k or "quantise" in k}
    assert check(small, part, tmp_path, "--kind=given", "--dtype=F32") == PASSED
    assert "of 7 vectors asked" in capsys.readouterr().out
    assert check(small, part, tmp_path) == FAILED
    assert check(small, part, tmp_path, "--kind=quantise-nf4", "--dtype=F32") == PASSED
    assert check(small, part, tmp_path, "--kind=nf5") == UNUSABLE
    assert "--kind nf5: the kinds are" in capsys.readouterr().err

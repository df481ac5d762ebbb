"""Whatever is done to the files: never a traceback, and never a pass where data that matters changed."""

from __future__ import annotations

import contextlib
import io
import os
import shutil
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from conformance.vectors.__main__ import FAILED, PASSED, UNUSABLE, main
from conformance.vectors.tensors import TensorFileError, read_tensors

FEW = settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
OUTPUTS = "outputs.safetensors"


@st.composite
def damage(draw: st.DrawFn, size: int) -> tuple[str, int, bytes]:
    """What to do, where, and with which bytes; the first kilobyte, the header's, as often as the rest."""
    place = draw(st.one_of(st.integers(0, min(size - 1, 1024)), st.integers(0, size - 1)))
    deed = draw(st.sampled_from(["flip", "cut", "insert", "overwrite", "drop"]))
    return deed, place, draw(st.binary(min_size=1, max_size=9))


def damaged(data: bytes, deed: str, place: int, given_bytes: bytes) -> bytes:
    if deed == "cut":
        return data[:place]
    if deed == "insert":
        return data[:place] + given_bytes + data[place:]
    if deed == "drop":
        return data[:place] + data[place + len(given_bytes) :]
    if deed == "flip":
        return data[:place] + bytes([data[place] ^ (given_bytes[0] or 1)]) + data[place + 1 :]
    return data[:place] + given_bytes + data[place + len(given_bytes) :]


def run(folder: Path, outputs: Path) -> tuple[int, str]:
    """The exit code, and what was said; an exception would come through and fail the test."""
    with (
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()) as err,
    ):
        return main(["check", str(folder), str(outputs)]), err.getvalue()


@FEW
@given(st.data())
def test_damaged_vectors_are_never_believed(
    small: Path, small_honest: Path, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    copy = tmp_path_factory.mktemp("set", numbered=True) / "set"
    shutil.copytree(small, copy)
    file = copy / data.draw(st.sampled_from(sorted(os.listdir(copy))))
    before = file.read_bytes()
    after = damaged(before, *data.draw(damage(len(before))))
    file.write_bytes(after)

    code, error = run(copy, small_honest)
    shutil.rmtree(copy)
    if after == before:
        assert code == PASSED
    else:
        assert code == UNUSABLE
        assert error.startswith(f"error: {copy}")


@FEW
@given(st.data())
def test_damaged_outputs_pass_only_if_they_say_the_same(
    small: Path, small_honest: Path, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """A pass means that the tensors are there, and within their bounds: judged here once more."""
    before = small_honest.read_bytes()
    after = damaged(before, *data.draw(damage(len(before))))
    outputs = tmp_path_factory.mktemp("out", numbered=True) / OUTPUTS
    outputs.write_bytes(after)

    code, error = run(small, outputs)
    outputs.unlink()
    if code == UNUSABLE:
        assert error.startswith(f"error: {outputs}")
    elif code == PASSED:
        assert acceptable(small, after)
    else:
        assert code == FAILED
        assert after != before


def acceptable(small: Path, data: bytes) -> bool:
    """Written apart from the checker: every tensor that is asked for, by name, dtype, shape and value."""
    import json

    import numpy as np

    found = read_tensors(data)
    expected = read_tensors((small / "expected.safetensors").read_bytes())
    asked = {}
    for vector in json.loads((small / "index.json").read_text())["vectors"]:
        asked |= {o["key"]: o for o in vector["outputs"]}
    if set(found) != set(asked):
        return False
    for key, output in asked.items():
        bound = expected[output["bounds"]["input"]].values if output["bounds"] else 0.0
        tensor = found[key]
        if tensor.dtype != output["dtype"] or list(tensor.shape) != output["shape"]:
            return False
        if not np.all(np.abs(tensor.values - expected[key].values) <= bound):
            return False
    return True


@settings(FEW, max_examples=200)
@given(st.binary(max_size=200))
def test_any_bytes_are_tensors_or_an_error(data: bytes) -> None:
    with contextlib.suppress(TensorFileError):
        read_tensors(data)


@settings(FEW, max_examples=200)
@given(
    header=st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
        lambda inner: (
            st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3)
        ),
        max_leaves=8,
    ),
    rest=st.binary(max_size=32),
)
def test_any_header_is_tensors_or_an_error(header: object, rest: bytes) -> None:
    import json

    text = json.dumps(header).encode()
    with contextlib.suppress(TensorFileError):
        read_tensors(len(text).to_bytes(8, "little") + text + rest)


@settings(FEW, max_examples=100)
@given(
    name=st.sampled_from(["F32", "BF16", "F8_E4M3", "BOOL", "I64", "F99"]),
    shape=st.lists(st.integers(-2, 2**70), max_size=4),
    span=st.lists(st.integers(-9, 99), min_size=2, max_size=2),
)
def test_any_entry_is_a_tensor_or_an_error(name: str, shape: list[int], span: list[int]) -> None:
    import json

    entry = {"k": {"dtype": name, "shape": shape, "data_offsets": span}}
    text = json.dumps(entry).encode()
    with contextlib.suppress(TensorFileError):
        read_tensors(len(text).to_bytes(8, "little") + text + bytes(16))

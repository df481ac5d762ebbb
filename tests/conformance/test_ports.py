"""A port loads by name or by path, and one that cannot says what to do."""

from __future__ import annotations

import types
from pathlib import Path

import pytest

from conformance.port import PortError, load_port, port_from_module


def test_a_dotted_name_loads() -> None:
    port = load_port("conformance.ports.peft")
    assert port.provides("4bit")
    assert port.provides("8bit")
    assert port.arithmetic == "float32"


def test_a_file_loads_and_may_provide_one_layer(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text("__version__ = '3.1'\ndef SVDLinear4bit(*args, **kwargs): ...\n")
    port = load_port(str(file))
    assert (port.name, port.version) == ("mine", "3.1")
    assert port.provides("4bit")
    assert not port.provides("8bit")


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("no_such_module_anywhere", "does not import: ModuleNotFoundError"),
        ("no/such/file.py", "is not a file"),
        ("json", "has neither `SVDLinear4bit` nor `SVDLinear8bitLt`"),
    ],
)
def test_a_port_that_cannot_be_loaded_says_why(spec: str, message: str) -> None:
    with pytest.raises(PortError, match=message):
        load_port(spec)


def test_a_file_that_raises_is_reported(tmp_path: Path) -> None:
    file = tmp_path / "broken.py"
    file.write_text("raise RuntimeError('needs a licence')\n")
    with pytest.raises(PortError, match="RuntimeError: needs a licence"):
        load_port(str(file))


def test_an_unknown_arithmetic_is_refused() -> None:
    module = types.ModuleType("mine")
    module.SVDLinear4bit = lambda: None  # type: ignore[attr-defined]
    module.ADAPTER_ARITHMETIC = "float8"  # type: ignore[attr-defined]
    with pytest.raises(PortError, match="must be 'float32' or 'input'"):
        port_from_module(module, "mine")


def test_an_attribute_that_is_not_callable_is_refused() -> None:
    module = types.ModuleType("mine")
    module.SVDLinear4bit = 3  # type: ignore[attr-defined]
    with pytest.raises(PortError, match="is not callable"):
        port_from_module(module, "mine")

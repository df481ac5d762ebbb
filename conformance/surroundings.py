"""What a port finds and must leave: the process's numerical state, and other packages' functions."""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np
import torch

_matmul = torch.backends.cuda.matmul


@dataclass(frozen=True)
class Setting:
    """One global setting: how it is read and, where it can be, set."""

    get: Callable[[], Any]
    set: Callable[[Any], object] | None = None


def _attribute(owner: Any, name: str) -> Setting:
    return Setting(lambda: getattr(owner, name), lambda value: setattr(owner, name, value))


def _set_default_device(device: torch.device) -> None:
    # torch's default is no device mode at all, and reads as the CPU.
    torch.set_default_device(None if device.type == "cpu" else device)


def _flushes_denormals() -> bool:
    return float(torch.tensor(1e-40) * 1.0) == 0.0


SETTINGS: Mapping[str, Setting] = {
    "torch's default dtype": Setting(torch.get_default_dtype, torch.set_default_dtype),
    "torch's default device": Setting(torch.get_default_device, _set_default_device),
    "the grad mode": Setting(torch.is_grad_enabled, torch.set_grad_enabled),
    "inference mode": Setting(torch.is_inference_mode_enabled),
    **{
        f"autocast on {device}": Setting(
            functools.partial(torch.is_autocast_enabled, device),
            functools.partial(torch.set_autocast_enabled, device),
        )
        for device in ("cpu", "cuda")
    },
    **{
        f"the autocast dtype on {device}": Setting(
            functools.partial(torch.get_autocast_dtype, device),
            functools.partial(torch.set_autocast_dtype, device),
        )
        for device in ("cpu", "cuda")
    },
    "autocast's cache": Setting(torch.is_autocast_cache_enabled, torch.set_autocast_cache_enabled),
    "the number of threads": Setting(torch.get_num_threads, torch.set_num_threads),
    "deterministic algorithms": Setting(
        torch.are_deterministic_algorithms_enabled, torch.use_deterministic_algorithms
    ),
    "flushing of denormals": Setting(_flushes_denormals, torch.set_flush_denormal),
    "the fp32 matmul precision": Setting(
        torch.get_float32_matmul_precision, torch.set_float32_matmul_precision
    ),
    "TF32 in matrix products": _attribute(_matmul, "allow_tf32"),
    "reduced precision in bf16 products": _attribute(
        _matmul, "allow_bf16_reduced_precision_reduction"
    ),
    "reduced precision in fp16 products": _attribute(
        _matmul, "allow_fp16_reduced_precision_reduction"
    ),
    "cuDNN's determinism": _attribute(torch.backends.cudnn, "deterministic"),
    "cuDNN's benchmark mode": _attribute(torch.backends.cudnn, "benchmark"),
    "NumPy's error handling": Setting(np.geterr, lambda value: np.seterr(**value)),
    "the working directory": Setting(os.getcwd, os.chdir),
}

# Whose functions are compared: what users and this suite call.
_OWNERS: tuple[ModuleType | type, ...] = (
    torch,
    torch.Tensor,
    torch.autograd,
    torch.autograd.Function,
    torch.nn.functional,
    torch.nn.init,
    torch.nn.Module,
    torch.nn.Parameter,
    torch.nn.Linear,
    torch.nn.Dropout,
    torch.linalg,
    torch.random,
    np,
    np.random,
)
# torch sets it to the default dtype's storage: whoever changes the one is not to be told of both.
_FOLLOWS_A_SETTING = frozenset({(torch, "Storage")})


def read_settings() -> dict[str, Any]:
    """Every setting's value now."""
    return {name: setting.get() for name, setting in SETTINGS.items()}


def differences(before: Mapping[str, Any]) -> list[str]:
    """The settings that are not as they were, in words."""
    after = read_settings()
    return [
        f"{name} was {value} and is {after[name]}"
        for name, value in before.items()
        if after[name] != value
    ]


def restore_settings(before: Mapping[str, Any]) -> None:
    """Set what differs back."""
    for name, value in before.items():
        setting = SETTINGS[name]
        if setting.set is not None and setting.get() != value:
            setting.set(value)


@functools.cache
def originals() -> Mapping[tuple[ModuleType | type, str], Any]:
    """The functions of the packages that a port builds on, as they are before a port is loaded."""
    # Here, since it takes seconds: who loads no port has no use for it.
    import bitsandbytes
    from bitsandbytes.nn import Int8Params, Linear4bit, Linear8bitLt, Params4bit

    of_bitsandbytes: tuple[ModuleType | type, ...] = (
        bitsandbytes,
        bitsandbytes.functional,
        bitsandbytes.nn,
        Linear4bit,
        Linear8bitLt,
        Params4bit,
        Int8Params,
    )
    return {
        (owner, name): value
        for owner in _OWNERS + of_bitsandbytes
        for name, value in vars(owner).items()
        if callable(value) or isinstance(value, (property, classmethod, staticmethod))
        if (owner, name) not in _FOLLOWS_A_SETTING
    }


def replaced_functions() -> Iterator[str]:
    """Put back every function that was replaced, and yield its name.

    torch replaces some of its own (`torch.manual_seed`, when its compiler is loaded): those stay.
    """
    for (owner, name), value in originals().items():
        now = vars(owner).get(name)
        if now is value or _is_torchs_own(now):
            continue
        setattr(owner, name, value)
        prefix = owner.__name__
        if isinstance(owner, type):
            prefix = f"{owner.__module__}.{owner.__qualname__}"
        yield f"{prefix}.{name}"


def _is_torchs_own(value: Any) -> bool:
    code = getattr(value, "__code__", None)
    folder = os.path.dirname(str(torch.__file__)) + os.sep
    return code is not None and str(code.co_filename).startswith(folder)


class Watch:
    """While it is held, what changes is noticed; when it ends, it is put back.

    `changed` and `replaced` say what, after the end.
    """

    def __enter__(self) -> Watch:
        originals()
        self._before = read_settings()
        self.changed: tuple[str, ...] = ()
        self.replaced: tuple[str, ...] = ()
        return self

    def __exit__(self, *_raised: object) -> None:
        self.replaced = tuple(replaced_functions())
        self.changed = tuple(differences(self._before))
        restore_settings(self._before)

    def findings(self) -> str:
        """A sentence for each kind of change; empty if there was none."""
        said = [f"The port replaced {', '.join(self.replaced)}."] if self.replaced else []
        return " ".join([*said, *(f"Left behind by the port: {c}." for c in self.changed)])


class Tripwire:
    """While it is held, `reference` and this suite cannot be imported: a port that tries is noted.

    The modules leave `sys.modules`; those who hold them already keep them. `conformance.ports` stays
    within reach, because ports live there.
    """

    def __init__(self) -> None:
        self.reached: list[str] = []
        self._hidden: dict[str, ModuleType] = {}
        self._attributes: dict[str, Any] = {}

    def __enter__(self) -> Tripwire:
        package = sys.modules[str(__package__)]
        self._hidden = {name: m for name, m in sys.modules.items() if _is_out_of_reach(name)}
        for name in self._hidden:
            del sys.modules[name]
            parent, _, child = name.rpartition(".")
            if parent == __package__ and child in vars(package):
                self._attributes[child] = vars(package)[child]
                delattr(package, child)
        sys.meta_path.insert(0, self)
        return self

    def __exit__(self, *_raised: object) -> None:
        sys.meta_path.remove(self)
        sys.modules.update(self._hidden)
        for name, value in self._attributes.items():
            setattr(sys.modules[str(__package__)], name, value)

    def find_spec(self, name: str, *_where: object) -> None:
        """Part of Python's import protocol: refuse what is out of reach, leave all else to others."""
        if _is_out_of_reach(name):
            self.reached.append(name)
            raise ModuleNotFoundError(f"`{name}` is out of a port's reach.", name=name)


def _is_out_of_reach(name: str) -> bool:
    top, _, rest = name.partition(".")
    if top == "reference":
        return True
    return top == __package__ and bool(rest) and rest.partition(".")[0] != "ports"

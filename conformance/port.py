"""Ports: how the suite meets an implementation, and nothing else of it.

A port is a module, by dotted name or by path, with `SVDLinear4bit` and/or `SVDLinear8bitLt`: callables

    (base_layer, adapter_name, r=0, lora_alpha=1, lora_dropout=0.0, init_lora_weights=True)

that return a `torch.nn.Module` with the attributes of SPEC.md (ADPT-8). It may also say

    ADAPTER_ARITHMETIC = "float32"   # or "input"

"float32": for half-precision inputs the adapter path stores its intermediates in fp32, and is held to
that. "input" (the default): it may store them in the input's dtype, and its bounds are wider.

A port that allocates ranks has, beside its layers, what chapter RANK of SPEC.md asks for:

    AdaLoraConfig(**settings)                       # init_r, target_r, tinit, ...: PEFT's field names
    RankAllocator(model, config, adapter_name)      # .step(global_step, grad_scale=1.0) -> budget
                                                    # .state_dict(), .load_state_dict(state)
    orthogonal_penalty(model, adapter_name)         # a scalar tensor; may come alone

A port without them is not asked, and conforms.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import sys
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import torch
from torch import nn

from conformance.spec import KINDS, Kind
from conformance.surroundings import Tripwire, Watch

DEFAULT_PORT = "qsvd"
CLASS_NAMES: Mapping[Kind, str] = {"4bit": "SVDLinear4bit", "8bit": "SVDLinear8bitLt"}
Arithmetic = Literal["float32", "input"]
Constructor = Callable[..., nn.Module]


class PortError(Exception):
    """A port that cannot be loaded: the message says which and what to do."""


@dataclass(frozen=True)
class Allocation:
    """What a port that allocates ranks offers beside its layers: see chapter RANK of SPEC.md."""

    config: Callable[..., Any]
    allocator: Callable[..., Any]


@dataclass(frozen=True)
class Port:
    """An implementation under test: its two constructors, by kind of base layer, and its allocator."""

    name: str
    version: str
    constructors: Mapping[Kind, Constructor] = field(repr=False)
    arithmetic: Arithmetic = "input"
    allocation: Allocation | None = field(default=None, repr=False)
    penalty: Callable[..., torch.Tensor] | None = field(default=None, repr=False)
    # Evaluates a model's 4-bit layers from packed copies, meanwhile; no clause asks for it.
    packing: Callable[..., AbstractContextManager[Any]] | None = field(default=None, repr=False)
    # What loading the port did beside: to global state, to others' functions, and what it reached for.
    changed_by_loading: tuple[str, ...] = ()
    replaced_by_loading: tuple[str, ...] = ()
    reached_by_loading: tuple[str, ...] = ()

    def provides(self, kind: Kind) -> bool:
        return kind in self.constructors


def load_port(spec: str) -> Port:
    """Load a port from a dotted module name or a path to a `.py` file.

    Raises:
        PortError: when it does not import, has neither class, declares an unknown arithmetic, or offers
            half an allocator.
    """
    with Watch() as watch, Tripwire() as wire:
        module = _import_file(Path(spec)) if spec.endswith(".py") else _import_module(spec)
    return replace(
        port_from_module(module, port_name(spec)),
        changed_by_loading=watch.changed,
        replaced_by_loading=watch.replaced,
        reached_by_loading=tuple(wire.reached),
    )


def port_name(spec: str) -> str:
    """How a port is called: its dotted name, or its file's name."""
    return Path(spec).stem if spec.endswith(".py") else spec


def port_from_module(module: ModuleType, name: str) -> Port:
    """Read the constructors, the declared arithmetic and what else is offered off a module."""
    constructors: dict[Kind, Constructor] = {}
    for kind in KINDS:
        constructor = getattr(module, CLASS_NAMES[kind], None)
        if constructor is None:
            continue
        if not callable(constructor):
            raise PortError(f"Port `{name}`: `{CLASS_NAMES[kind]}` is not callable.")
        constructors[kind] = constructor
    if not constructors:
        raise PortError(
            f"Port `{name}` has neither `{CLASS_NAMES['4bit']}` nor `{CLASS_NAMES['8bit']}`: "
            "a port is a module with at least one of them."
        )
    arithmetic: Arithmetic = getattr(module, "ADAPTER_ARITHMETIC", "input")
    if arithmetic not in ("float32", "input"):
        raise PortError(
            f"Port `{name}`: ADAPTER_ARITHMETIC is {arithmetic!r}; it must be 'float32' or 'input'."
        )
    return Port(
        name,
        _version_of(module),
        constructors,
        arithmetic,
        _allocation_of(module, name),
        _offered(module, name, "orthogonal_penalty"),
        _offered(module, name, "packed_for_inference"),
    )


def _allocation_of(module: ModuleType, name: str) -> Allocation | None:
    allocator = _offered(module, name, "RankAllocator")
    if allocator is None:
        return None
    config = _offered(module, name, "AdaLoraConfig")
    if config is None:
        raise PortError(
            f"Port `{name}` has a `RankAllocator` and no `AdaLoraConfig`: the allocator is built from "
            "one (SPEC.md, chapter RANK)."
        )
    return Allocation(config, allocator)


def _offered(module: ModuleType, port: str, name: str) -> Callable[..., Any] | None:
    """A callable that a port need not have."""
    offered: Callable[..., Any] | None = getattr(module, name, None)
    if offered is not None and not callable(offered):
        raise PortError(f"Port `{port}`: `{name}` is not callable.")
    return offered


def _import_module(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except Exception as error:  # whatever a port's import raises is the port's, and is reported
        raise PortError(
            f"Port `{name}` does not import: {type(error).__name__}: {error}. "
            "A port is a dotted module name or a path to a .py file."
        ) from error


def _import_file(path: Path) -> ModuleType:
    if not path.is_file():
        raise PortError(f"Port `{path}` is not a file.")
    spec = importlib.util.spec_from_file_location(f"conformance_port_{path.stem}", path.resolve())
    if spec is None or spec.loader is None:
        raise PortError(f"Port `{path}` is not a Python file.")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # so that its layers can be pickled
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[spec.name]
        raise PortError(
            f"Port `{path}` does not import: {type(error).__name__}: {error}."
        ) from error
    return module


def _version_of(module: ModuleType) -> str:
    declared = getattr(module, "__version__", None)
    if declared is not None:
        return str(declared)
    try:
        return importlib.metadata.version(module.__name__.partition(".")[0])
    except importlib.metadata.PackageNotFoundError:
        return "unknown"

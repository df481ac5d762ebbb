"""Who is measured: the base layer alone, the ports, and PEFT's AdaLoRA and LoRA layers."""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from torch import nn

from conformance.benchmarks.grid import Scenario
from conformance.benchmarks.results import Role
from conformance.case import ADAPTER_NAMES
from conformance.port import Port, PortError, load_port

PEFT_PORT = "conformance.ports.peft"
ADALORA, LORA = "PEFT AdaLoRA", "PEFT LoRA"
FULL = "(none masked)"
PACKED = "(packed)"
Build = Callable[[nn.Module, Scenario], nn.Module]
Packing = Callable[[nn.Module], AbstractContextManager[Any]]


@dataclass(frozen=True)
class Contestant:
    """A layer to be measured: how it is built over a base layer that it may keep."""

    name: str
    role: Role
    version: str
    build: Build
    provides: Callable[[Scenario], bool] = lambda scenario: True
    packing: Packing | None = None


def base_alone(version: str) -> Contestant:
    """The quantised layer, without any adapter."""
    return Contestant("base", "base", version, lambda base, scenario: base)


def of_port(port: Port, name: str, role: Role = "port") -> Contestant:
    """The AdaLoRA layers of a port."""
    return Contestant(
        name,
        role,
        port.version,
        lambda base, scenario: _adapted(port, base, scenario),
        lambda scenario: port.provides(scenario.kind),
        port.packing,
    )


def of_peft() -> tuple[list[Contestant], str]:
    """PEFT's AdaLoRA and LoRA layers; without PEFT none, and the reason in one line."""
    try:
        lora = importlib.import_module("conformance.benchmarks.peft_lora")
        port = load_port(PEFT_PORT)
    except (ImportError, PortError) as error:
        reason = str(error).partition("\n")[0]
        return [], f"PEFT is not measured, and nothing is compared with it: {reason}"

    def build(base: nn.Module, scenario: Scenario) -> nn.Module:
        names = ADAPTER_NAMES[: scenario.adapters]
        layer: nn.Module = lora.lora_layer(
            scenario.kind, base, names, scenario.rank, scenario.dropout
        )
        return _prepared(layer, scenario, masked=False)

    return [
        of_port(port, ADALORA, "adalora"),
        Contestant(LORA, "lora", lora.__version__, build),
    ], ""


def with_others(contestants: Sequence[Contestant], scenario: Scenario) -> list[Contestant]:
    """The same, and beside them, where the scenario compares a layer with itself, the other one.

    A masked AdaLoRA layer is measured with none of its E zero, too, and one that can evaluate from
    packed copies so, where bitsandbytes may pack.
    """
    found = []
    for c in contestants:
        found.append(c)
        others = {}
        if scenario.masked and c.role in ("port", "adalora"):
            others[FULL] = _unmasked(c)
        if scenario.repack and c.packing is not None:
            others[PACKED] = _packed(c, c.packing)
        for told, build in others.items():
            found.append(Contestant(f"{c.name} {told}", c.role, c.version, build, c.provides))
    return found


def _packed(contestant: Contestant, packing: Packing) -> Build:
    def build(base: nn.Module, scenario: Scenario) -> nn.Module:
        layer: Any = contestant.build(base, scenario)
        meanwhile = packing(layer)
        meanwhile.__enter__()
        layer.meanwhile = meanwhile  # as long as the layer is there
        return layer  # type: ignore[no-any-return]

    return build


def _unmasked(contestant: Contestant) -> Build:
    def build(base: nn.Module, scenario: Scenario) -> nn.Module:
        layer = contestant.build(base, scenario)
        return _prepared(layer, scenario, masked=False)

    return build


def make_base(scenario: Scenario, device: torch.device) -> nn.Module:
    """A frozen quantised layer of random weights, without bias."""
    shape = (scenario.in_features, scenario.out_features)
    base: Linear4bit | Linear8bitLt
    if scenario.kind == "4bit":
        base = Linear4bit(
            *shape, bias=False, compute_dtype=scenario.product_dtype, quant_type="nf4"
        )
        if not scenario.repack:
            base.support_avx512bf16_for_cpu = False
    else:
        base = Linear8bitLt(*shape, bias=False, has_fp16_weights=False)
    with torch.no_grad():
        generator = torch.Generator().manual_seed(0)
        weight = torch.randn(shape[1], shape[0], generator=generator) * shape[0] ** -0.5
        base.weight.data = weight.to(scenario.product_dtype)
    base.requires_grad_(False)
    moved: nn.Module = base.to(device)
    return moved


def twin(base: nn.Module) -> nn.Module:
    """A layer of its own with the other's very weight."""
    found = copy.copy(base)
    for name in ("_parameters", "_buffers", "_modules"):
        found.__dict__[name] = dict(base.__dict__[name])
    return found


def build(contestant: Contestant, base: nn.Module, scenario: Scenario) -> nn.Module:
    """The contestant's layer over a copy of the base layer: nobody meets another's traces."""
    layer = contestant.build(copy.deepcopy(base), scenario)
    return layer.train(scenario.mode == "step")


def _adapted(port: Port, base: nn.Module, scenario: Scenario) -> nn.Module:
    names = ADAPTER_NAMES[: scenario.adapters]
    options = (scenario.rank, float(scenario.rank), scenario.dropout)
    layer: Any = port.constructors[scenario.kind](base, names[0], *options)
    for name in names[1:]:
        layer.update_layer(name, *options)
    layer.set_adapter(list(names))
    for ranknum in layer.ranknum.values():
        # PEFT lets it require a gradient by mistake; what that costs is not what is measured here.
        ranknum.requires_grad_(False)
    return _prepared(layer, scenario, masked=scenario.masked)


def _prepared(layer: nn.Module, scenario: Scenario, *, masked: bool) -> nn.Module:
    """Parameters as training leaves them: no E is zero but where it is masked."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            if ".lora_" not in f".{name}":
                continue
            values = torch.randn(parameter.shape, generator=generator)
            singular = "lora_E" in name
            parameter.copy_(values if singular else values * 0.02)
            if singular and masked:
                # Spread over the ranks, as pruning leaves them.
                dead = torch.ones(scenario.rank, dtype=torch.bool)
                dead[:: max(1, scenario.rank // max(1, scenario.live_rank))] = False
                parameter[dead.to(parameter.device)] = 0.0
            parameter.requires_grad_(True)
    return layer

"""Adapters in files, in PEFT's format: saved by one of the two libraries, loaded by either."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from qsvd._checks import check_known_names, check_new_name
from qsvd._config import AdaLoraConfig
from qsvd._distributed import Peers, check_not_distributed, group_of, reshard
from qsvd._files import CONFIG_HASH, config_hash, read_pair, write_pair
from qsvd._gathering import whole
from qsvd._layer import SVDLayer
from qsvd._model import adapted_layers, layers_with, put_in_place, record_of
from qsvd._targets import find_targets

M = TypeVar("M", bound=nn.Module)

# PEFT names what it wraps `base_model.model`, and leaves the adapter's name out of a file's keys.
_PREFIX = "base_model.model."
_KEY = re.compile(re.escape(_PREFIX) + r"(?P<layer>.+)\.lora_(?P<part>[AEB])$")


@dataclass(frozen=True)
class Triplets:
    """One layer's A (r, in), E (r, 1), B (out, r), fp32 on the CPU."""

    A: Tensor
    E: Tensor
    B: Tensor

    @property
    def rank(self) -> int:
        return len(self.A)

    def kept(self, pattern: Sequence[bool]) -> Triplets:
        """Only the triplets that a pattern of r booleans keeps."""
        keep = torch.tensor(pattern, dtype=torch.bool)
        return Triplets(self.A[keep], self.E[keep], self.B[:, keep])


def save_adapter(
    model: nn.Module,
    folder: str | os.PathLike[str],
    adapter_name: str = "default",
    *,
    prune: bool = True,
) -> None:
    """Write one adapter as `adapter_model.safetensors` and `adapter_config.json`, as PEFT does.

    A process killed at any moment leaves the old pair of files or the new one: see `qsvd._files`.

    A model in DistributedDataParallel, or sharded by `fully_shard`, is saved on all processes
    together: the first writes whole tensors, and all return when the files are there. Any other is
    written by whoever calls: on one process only, where several hold it.

    Args:
        model: adapted by `qsvd.adapt` or `load_adapter`.
        folder: made if it is not there; other files in it are left alone.
        adapter_name: which adapter.
        prune: leave out the triplets that the allocator has masked, and say so in `rank_pattern`.
            False keeps them, to go on allocating after a load.

    Raises:
        ValueError: for a model that is not adapted, or has no such adapter.
        RuntimeError: on the other processes, if the first one could not write.
    """
    adapted = layers_with(model, adapter_name)
    record = record_of(model)
    check_known_names([adapter_name], record.configs if record else ())
    assert record is not None  # sanity check: the line above has refused
    config = record.configs[adapter_name]
    reshard(model)
    peers = Peers.of(group_of(model), [layer.lora_E[adapter_name] for layer in adapted.values()])
    layers = _triplets(adapted, adapter_name)
    pattern = record.patterns.get(adapter_name) if prune else None
    if pattern is not None:
        layers = {n: t.kept(pattern[f"{n}.lora_E"]) for n, t in layers.items()}
        config = replace(config, rank_pattern=_composed(config.rank_pattern, pattern))
    tensors = {
        f"{_PREFIX}{name}.lora_{part}": getattr(triplets, part).contiguous()
        for name, triplets in layers.items()
        for part in "AEB"
    }
    saved = {**config.to_dict(), "inference_mode": True}
    text = json.dumps(saved, indent=2, sort_keys=True).encode() + b"\n"
    metadata = {"format": "pt", CONFIG_HASH: config_hash(text)}
    peers.once(lambda: write_pair(Path(folder), save(tensors, metadata), text))


def load_adapter(
    model: M,
    folder: str | os.PathLike[str],
    adapter_name: str = "default",
    *,
    trainable: bool = False,
) -> M:
    """Read an adapter that `save_adapter` or PEFT's `save_pretrained` wrote.

    A model that is not adapted yet is adapted as the file's configuration says; to one that is, the
    adapter is added under a new name, and made the active one.

    Args:
        model: the base model, quantised, or one that is adapted already; before it is wrapped or
            sharded.
        folder: with `adapter_model.safetensors` and `adapter_config.json`. Nothing is unpickled.
        adapter_name: a new name for the adapter.
        trainable: go on training it.

    Returns:
        The same model.

    Raises:
        FileNotFoundError: if one of the two files is not there.
        ValueError: if they do not fit the model or one another, naming the key; if the model is
            wrapped or sharded. The model is then as it was.
        TypeError: as `qsvd.adapt`.
    """
    check_not_distributed(model, "load the adapter")
    path, content = read_pair(Path(folder))
    config = AdaLoraConfig.from_json(content, Path(folder) / "adapter_config.json")
    config = replace(config, inference_mode=not trainable)
    record = record_of(model)
    check_new_name(adapter_name, taken=record.configs if record else ())
    modules: Mapping[str, nn.Module] = (
        adapted_layers(model) if record else find_targets(model, config)
    )
    triplets = _read(path, modules, config)
    if record is None:
        # What is drawn is replaced at once: the generator is left where it was.
        with torch.random.fork_rng(devices=_generators(modules)):
            ranks = {name: t.rank for name, t in triplets.items()}
            put_in_place(model, modules, config, adapter_name, ranks)
    else:
        with torch.random.fork_rng(devices=_generators(modules)):
            for name, layer in adapted_layers(model).items():
                rank = triplets[name].rank
                layer.update_layer(adapter_name, rank, config.lora_alpha, config.lora_dropout)
        record.configs[adapter_name] = config
    for name, layer in adapted_layers(model).items():
        _install(layer, adapter_name, triplets[name], config)
    return model


def _generators(modules: Mapping[str, nn.Module]) -> list[torch.device]:
    """The GPUs whose random numbers new parameters would draw."""
    devices = {p.device for m in modules.values() for p in m.parameters()}
    return [device for device in devices if device.type == "cuda"]


def _composed(
    given: Mapping[str, Sequence[bool]] | None, kept: Mapping[str, Sequence[bool]]
) -> dict[str, list[bool]]:
    """`kept`, which is about the ranks that `given` left, as a pattern of all `init_r` ranks."""
    if given is None:
        return {key: list(pattern) for key, pattern in kept.items()}
    later = {key: iter(pattern) for key, pattern in kept.items()}
    return {key: [was and next(later[key]) for was in given[key]] for key in kept}


def _triplets(layers: Mapping[str, SVDLayer], adapter_name: str) -> dict[str, Triplets]:
    """Of each layer its own, whole: asked of all processes that hold shards of them."""
    parts = [p for layer in layers.values() for p in (layer.lora_A, layer.lora_E, layer.lora_B)]
    tensors = iter([t.cpu() for t in whole([p[adapter_name].detach() for p in parts])])
    return {name: Triplets(next(tensors), next(tensors), next(tensors)) for name in layers}


def _install(layer: SVDLayer, adapter_name: str, triplets: Triplets, config: AdaLoraConfig) -> None:
    """Give a layer the triplets; their scale stays that of `init_r`, however few are left."""
    with torch.no_grad():
        layer.lora_A[adapter_name].copy_(triplets.A)
        layer.lora_E[adapter_name].copy_(triplets.E)
        layer.lora_B[adapter_name].copy_(triplets.B)
        layer.ranknum[adapter_name].fill_(float(config.init_r))
    if config.lora_alpha <= 0:
        layer.scaling[adapter_name] = float(config.init_r)
    layer.set_adapter(adapter_name, inference_mode=config.inference_mode)
    if triplets.rank == 0:
        # They never get a gradient, and DistributedDataParallel waits for one of all that may have one.
        for parameters in (layer.lora_A, layer.lora_E, layer.lora_B):
            parameters[adapter_name].requires_grad_(False)


def _read(
    path: Path, modules: Mapping[str, nn.Module], config: AdaLoraConfig
) -> dict[str, Triplets]:
    """The triplets of every module, checked against its shape and the configuration."""
    try:
        tensors = load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is no safetensors file, or not all of it: {error}.") from None
    found: dict[str, dict[str, Tensor]] = {}
    for key, tensor in sorted(tensors.items()):
        match = _KEY.match(key)
        if match is None or match["layer"] not in modules:
            raise ValueError(f"{path}: `{key}` belongs to no layer that the configuration adapts.")
        found.setdefault(match["layer"], {})[match["part"]] = _checked(path, key, tensor)
    for name in modules:
        for part in "AEB":
            if part not in found.get(name, {}):
                raise ValueError(f"{path} lacks `{_PREFIX}{name}.lora_{part}`.")
    triplets = {name: Triplets(**found[name]) for name in modules}
    for name, module in modules.items():
        _check_shapes(path, name, triplets[name], module, _rank(path, name, config))
    if config.rank_pattern is not None:
        expected = {f"{name}.lora_E" for name in modules}
        if extra := sorted(set(config.rank_pattern) - expected):
            raise ValueError(
                f"{path.parent}: `rank_pattern` has {extra[0]!r}, which is no layer's."
            )
    return triplets


def _checked(path: Path, key: str, tensor: Tensor) -> Tensor:
    if not tensor.is_floating_point():
        raise ValueError(f"{path}: `{key}` is {tensor.dtype}; expected floating-point numbers.")
    if not tensor.isfinite().all():
        raise ValueError(f"{path}: `{key}` holds a NaN or an infinity.")
    return tensor.to(torch.float32)


def _rank(path: Path, name: str, config: AdaLoraConfig) -> int:
    """How many triplets the configuration says a layer has in the file."""
    if config.rank_pattern is None:
        return config.init_r
    kept = config.rank_pattern.get(f"{name}.lora_E")
    if kept is None:
        raise ValueError(f"{path.parent}: `rank_pattern` lacks '{name}.lora_E'.")
    if len(kept) != config.init_r:
        raise ValueError(
            f"{path.parent}: `rank_pattern` has {len(kept)} ranks at '{name}.lora_E', and `init_r` "
            f"is {config.init_r}."
        )
    return sum(kept)


def _check_shapes(path: Path, name: str, triplets: Triplets, module: nn.Module, rank: int) -> None:
    n, m = module.in_features, module.out_features
    for part, shape in (("A", (rank, n)), ("E", (rank, 1)), ("B", (m, rank))):
        got = tuple(getattr(triplets, part).shape)
        if got != shape:
            raise ValueError(
                f"{path}: `{_PREFIX}{name}.lora_{part}` is {got}, expected {shape} for a layer "
                f"{n} -> {m} with {rank} ranks."
            )

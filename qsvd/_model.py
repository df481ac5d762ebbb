"""A model's layers replaced by adapted ones in place, and given back."""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import nn
from torch.hub import tqdm  # type: ignore[attr-defined]  # a plain counter without tqdm

from qsvd._checks import check_known_names, check_new_name
from qsvd._config import AdaLoraConfig
from qsvd._dispatch import layer_for
from qsvd._distributed import check_not_distributed, unwrapped
from qsvd._layer import SVDLayer
from qsvd._targets import find_targets

M = TypeVar("M", bound=nn.Module)

_RECORD = "_qsvd"
_REPACKS = "support_avx512bf16_for_cpu"  # an attribute of bitsandbytes' Linear4bit
_MANY = 32  # layers from which on a progress bar is shown


@dataclass(frozen=True)
class Record:
    """What `adapt` did to a model.

    configs: by adapter, as given or as loaded; a `rank_pattern` there says which of `init_r` ranks the
    layers were given. patterns: by adapter, which of those the allocator kept last. trainable: the
    names of the parameters that were trainable before.
    """

    configs: dict[str, AdaLoraConfig]
    patterns: dict[str, dict[str, list[bool]]]
    trainable: frozenset[str]
    repacking: frozenset[str]


def adapt(model: M, config: AdaLoraConfig, adapter_name: str = "default") -> M:
    """Put AdaLoRA layers in the place of a model's target modules, and freeze the rest.

    The other 4-bit layers are kept from being repacked: on a CPU with AVX512-BF16 the first
    evaluation would change their arithmetic for good, and lose the gradient of what is below them.

    Args:
        model: with `bitsandbytes.nn.Linear4bit` or `Linear8bitLt` layers, as
            `from_pretrained(..., quantization_config=BitsAndBytesConfig(...))` gives it.
        config: which modules, and with which adapters.
        adapter_name: of the adapter in every layer.

    Returns:
        The same model, changed in place; `remove(model)` undoes it.

    Raises:
        ValueError: for targets that match nothing, are adapted already, tied or shared; for a model
            that is adapted already, wrapped or sharded.
        TypeError: for a target that is not a quantised layer. The model is then as it was.
    """
    check_not_distributed(model, "adapt it")
    if record_of(model) is not None:
        raise ValueError(
            "The model is adapted already. `qsvd.remove(model)` gives the original modules back."
        )
    check_new_name(adapter_name, taken=())
    targets = find_targets(model, config)
    put_in_place(model, targets, config, adapter_name, dict.fromkeys(targets, config.init_r))
    return model


def put_in_place(
    model: nn.Module,
    targets: Mapping[str, nn.Module],
    config: AdaLoraConfig,
    adapter_name: str,
    ranks: Mapping[str, int],
) -> None:
    """Wrap the targets, each with its own rank, and freeze the rest; all or nothing."""
    trainable = {name: p.requires_grad for name, p in model.named_parameters()}
    repacking = frozenset(n for n, m in model.named_modules() if getattr(m, _REPACKS, False))
    random_state = torch.get_rng_state()
    try:
        layers = {
            name: layer_for(module)(
                module,
                adapter_name,
                ranks[name],
                config.lora_alpha,
                config.lora_dropout,
                config.init_lora_weights,
            )
            for name, module in _with_progress(targets)
        }
    except BaseException:  # out of memory, or interrupted: nothing is in its place yet
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(trainable[name])
        _let_repack(model, repacking, True)
        torch.set_rng_state(random_state)
        raise
    model.requires_grad_(False)
    _let_repack(model, repacking, False)
    for name, layer in layers.items():
        _replace(model, name, layer)
        layer.set_adapter(adapter_name, inference_mode=config.inference_mode)
    were = frozenset(name for name, wanted in trainable.items() if wanted)
    object.__setattr__(model, _RECORD, Record({adapter_name: config}, {}, were, repacking))


def remove(model: M) -> M:
    """Give a model's original modules back, trainable as they were, and drop the adapters.

    Args:
        model: adapted by `adapt` or `load_adapter`; changed in place.

    Returns:
        The same model.

    Raises:
        ValueError: for a model that `adapt` has not adapted.
    """
    record = record_of(model)
    if record is None:
        raise ValueError("The model is not adapted: there is nothing to remove.")
    for name, layer in list(adapted_layers(model).items()):
        _replace(model, name, layer.base_layer)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in record.trainable)
    _let_repack(model, record.repacking, True)
    object.__delattr__(model, _RECORD)
    return model


def adapted_layers(model: nn.Module) -> dict[str, SVDLayer]:
    """The adapted layers of a model by name, in its order.

    Args:
        model: any module; one without adapted layers has none.
    """
    modules = unwrapped(model).named_modules()
    return {name: m for name, m in modules if isinstance(m, SVDLayer)}


def layers_with(model: nn.Module, adapter_name: str) -> dict[str, SVDLayer]:
    """The layers of a model that have an adapter, by name, in its order.

    Raises:
        ValueError: if there is none.
    """
    layers = adapted_layers(model)
    if not layers:
        raise ValueError(
            "The model has no layer of qsvd's: `qsvd.adapt(model, config)` adapts it. A model that "
            "PEFT adapted keeps PEFT's allocator; `qsvd.integrations.peft.accelerate` makes it faster."
        )
    check_known_names([adapter_name], {name for m in layers.values() for name in m.lora_A})
    return {name: m for name, m in layers.items() if adapter_name in m.lora_A}


def record_of(model: nn.Module) -> Record | None:
    """What `adapt` noted about a model; it is copied and pickled with the model."""
    record: Record | None = unwrapped(model).__dict__.get(_RECORD)
    return record


def note_pattern(model: nn.Module, adapter_name: str, pattern: Mapping[str, list[bool]]) -> None:
    """Remember which ranks of an adapter the allocator keeps, for when it is saved."""
    record = record_of(model)
    if record is not None and adapter_name in record.configs:
        record.patterns[adapter_name] = dict(pattern)


def _let_repack(model: nn.Module, names: Collection[str], allowed: bool) -> None:
    for name in names:
        setattr(model.get_submodule(name), _REPACKS, allowed)


def _with_progress(targets: Mapping[str, nn.Module]) -> Iterator[tuple[str, nn.Module]]:
    """The targets one by one, with a bar on a terminal if they are many."""
    silent = len(targets) < _MANY or not sys.stderr.isatty()
    with tqdm(total=len(targets), disable=silent, desc="adapting", unit="layer") as bar:
        for target in targets.items():
            yield target
            bar.update(1)


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)

"""Which modules of a model a configuration means: names, suffixes, an expression, or all of them."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence
from typing import Any

from torch import nn

from qsvd._config import AdaLoraConfig
from qsvd._dispatch import layer_for
from qsvd._layer import SVDLayer

ALL_LINEAR = "all-linear"
_LAYER_NUMBER = r"\.(?P<number>\d+)\."
_HEADS = ("score", "classifier", "qa_outputs")  # transformers' names of heads that a task trains


def find_targets(model: nn.Module, config: AdaLoraConfig) -> dict[str, nn.Module]:
    """The modules to adapt, by name, in the model's order. Nothing is changed.

    Raises:
        ValueError: if `target_modules` is missing or matches nothing, a name of a list included; if
            a target is adapted already, or is known by several names, or shares its weight.
        TypeError: if a target is not a quantised layer of bitsandbytes'.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    adapted = {name for name, module in modules.items() if isinstance(module, SVDLayer)}
    inside = {n for n in modules if any(n.startswith(f"{name}.") for name in adapted)}
    candidates = [name for name in modules if name and name not in inside]
    names = [n for n in _matching(model, modules, candidates, config) if not _excluded(n, config)]
    if not names:
        raise ValueError(_nothing_left(config))
    targets = {name: modules[name] for name in names}
    _refuse_adapted(targets)
    _refuse_unquantised(targets)
    _refuse_shared(targets, modules)
    return targets


def _matching(
    model: nn.Module,
    modules: dict[str, nn.Module],
    candidates: Sequence[str],
    config: AdaLoraConfig,
) -> list[str]:
    targets = config.target_modules
    if targets is None:
        raise ValueError(
            "`target_modules` is needed: names such as ['q_proj', 'v_proj'], an expression, or "
            f"{ALL_LINEAR!r}."
        )
    if targets == ALL_LINEAR:
        heads = _heads(model)
        return [
            n
            for n in candidates
            if _is_quantised(modules[n])
            and modules[n] not in heads
            and n.rpartition(".")[2] not in _HEADS
        ]
    if isinstance(targets, str):
        found = [n for n in candidates if re.fullmatch(targets, n)]
        if not found:
            raise ValueError(f"`target_modules` {targets!r} matches no module's whole name.")
        return found
    for target in targets:
        if not any(_names(target, n) for n in candidates):
            raise ValueError(_no_such_module(target, candidates))
    return [n for n in candidates if any(_names(t, n) for t in targets) and _in_layers(n, config)]


def _names(target: str, module: str) -> bool:
    """Whether a target is a module's name, or the end of it, whole parts only."""
    return module == target or module.endswith(f".{target}")


def _excluded(name: str, config: AdaLoraConfig) -> bool:
    excluded = config.exclude_modules
    if excluded is None:
        return False
    if isinstance(excluded, str):
        return re.fullmatch(excluded, name) is not None
    return any(_names(target, name) for target in excluded)


def _in_layers(name: str, config: AdaLoraConfig) -> bool:
    """Whether `layers_to_transform` lets a module through: by the first number in its name."""
    wanted = config.layers_to_transform
    if wanted is None:
        return True
    patterns = config.layers_pattern
    prefixes = [patterns] if isinstance(patterns, str) else list(patterns or [r"[^.]*"])
    for prefix in prefixes:
        if match := re.match(rf"(?:^|.*?\.){prefix}{_LAYER_NUMBER}", name):
            number = int(match["number"])
            return number == wanted if isinstance(wanted, int) else number in wanted
    return False


def _heads(model: nn.Module) -> set[nn.Module]:
    """The output embeddings, which transformers' models name."""
    getter: Any = getattr(model, "get_output_embeddings", None)
    head = getter() if callable(getter) else None
    return {head} if isinstance(head, nn.Module) else set()


def _is_quantised(module: nn.Module) -> bool:
    try:
        layer_for(module)
    except TypeError:
        return isinstance(module, SVDLayer)  # refused later, by its name
    return True


def _nothing_left(config: AdaLoraConfig) -> str:
    if config.target_modules == ALL_LINEAR:
        return (
            "No quantised layer to adapt: the model has no bitsandbytes Linear4bit or Linear8bitLt "
            "but its output head and what `exclude_modules` leaves out. Load it with a "
            "BitsAndBytesConfig."
        )
    return (
        f"`target_modules` {config.target_modules!r} matches modules, and `exclude_modules` "
        f"{config.exclude_modules!r} or `layers_to_transform` {config.layers_to_transform!r} "
        "leaves none of them."
    )


def _no_such_module(target: str, candidates: Iterable[str]) -> str:
    ends = sorted({name.rpartition(".")[2] for name in candidates} - {""})
    ends = [end for end in ends if not end.isdigit()]
    nearest = difflib.get_close_matches(target, ends, n=3, cutoff=0.5)
    hint = f"Did you mean {' or '.join(map(repr, nearest))}?" if nearest else f"There are: {ends}."
    return f"`target_modules`: no module is called {target!r}. {hint}"


def _refuse_adapted(targets: dict[str, nn.Module]) -> None:
    adapted = [name for name, module in targets.items() if isinstance(module, SVDLayer)]
    if adapted:
        raise ValueError(
            f"Adapted already: {_listed(adapted)}. Add an adapter with "
            "`module.update_layer(name, r)`, or give the original modules back with "
            "`qsvd.remove(model)` first."
        )


def _refuse_unquantised(targets: dict[str, nn.Module]) -> None:
    others = [name for name, module in targets.items() if not _is_quantised(module)]
    if others:
        kind = type(targets[others[0]])
        raise TypeError(
            f"Not quantised layers of bitsandbytes': {_listed(others)} ({others[0]} is a "
            f"{kind.__module__}.{kind.__name__}). Name them in `exclude_modules`, or load the model "
            "with a BitsAndBytesConfig."
        )
    for module in targets.values():
        layer_for(module).check_base_layer(module)


def _refuse_shared(targets: dict[str, nn.Module], modules: dict[str, nn.Module]) -> None:
    """One module under several names, or one weight in several modules, would be adapted once."""
    for name, module in targets.items():
        others = [
            other
            for other, candidate in modules.items()
            if other != name
            and (candidate is module or _weight(candidate) is _weight(module) is not None)
        ]
        if others:
            raise ValueError(
                f"{name} is shared with {_listed(others)}: adapting it would change them, too. "
                "Name it in `exclude_modules`."
            )


def _weight(module: nn.Module) -> object:
    return module._parameters.get("weight")


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(names[:5])
    return f"{shown} and {len(names) - 5} more" if len(names) > 5 else shown

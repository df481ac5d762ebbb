"""An allocator's state as one flat dictionary of tensors, which any checkpoint format can hold."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

_AVERAGES = ("means", "uncertainties")
_PATTERN = "rank_pattern"
_BUDGET = "budget"


def flattened(state: Mapping[str, Any]) -> dict[str, Tensor]:
    """What `RankAllocator.state_dict` returned, by names such as `means/layers.0.q_proj.lora_A`.

    The adapter's name is not in it: it belongs into the prefix that the caller gives the keys.
    """
    flat = {f"{what}/{key}": value for what in _AVERAGES for key, value in state[what].items()}
    for key, kept in (state[_PATTERN] or {}).items():
        flat[f"{_PATTERN}/{key}"] = torch.tensor(kept, dtype=torch.bool)
    flat[_BUDGET] = torch.tensor(state[_BUDGET], dtype=torch.int64)
    return flat


def unflattened(flat: Mapping[str, Tensor], adapter_name: str) -> dict[str, Any]:
    """The state that `flattened` was given, for `RankAllocator.load_state_dict`.

    Raises:
        ValueError: for a key that is none of an allocator's state, or without its budget.
    """
    parts: dict[str, dict[str, Any]] = {what: {} for what in (*_AVERAGES, _PATTERN)}
    for name, value in flat.items():
        what, _, key = name.partition("/")
        if name == _BUDGET:
            continue
        if what not in parts or not key:
            raise ValueError(f"Not an allocator's state: it has {name!r}.")
        parts[what][key] = value.tolist() if what == _PATTERN else value
    if _BUDGET not in flat:
        raise ValueError("Not an allocator's state: it has no 'budget'.")
    return {
        "adapter_name": adapter_name,
        **{what: parts[what] for what in _AVERAGES},
        _PATTERN: parts[_PATTERN] or None,
        _BUDGET: int(flat[_BUDGET]),
    }

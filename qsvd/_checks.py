"""What an adapter may be called and which numbers it may have: refused before anything changes."""

from __future__ import annotations

import difflib
import math
import operator
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from numbers import Real
from typing import Any

from torch import nn

# Keywords that PEFT's model hands to its layers and that describe the base layer. A layer here
# reads them off the base layer itself, so they are accepted and not used.
_DESCRIBE_BASE = frozenset(
    {
        "compress_statistics",
        "compute_dtype",
        "gptq_quantization_config",
        "has_fp16_weights",
        "index",
        "loaded_in_4bit",
        "loaded_in_8bit",
        "quant_storage",
        "quant_type",
        "threshold",
    }
)
# Keywords of PEFT's that would change what is computed. Only "no" is an answer that holds here.
_UNSUPPORTED = ("fan_in_fan_out", "inference_mode", "lora_bias", "use_dora", "use_rslora")
_NAMED = ("r", "lora_alpha", "lora_dropout", "init_lora_weights")


@dataclass(frozen=True)
class AdapterSettings:
    """The numbers of one adapter, checked.

    Args:
        r: the rank, an integer >= 0. 0 means that every singular value was pruned: y = base(x).
        lora_alpha: finite. The scaling is `lora_alpha` if it is positive, else `r`.
        lora_dropout: in [0, 1).
        init_lora_weights: True: E = 0, A and B ~ N(0, 0.02), the identity. False: all ~ N(0, 1).

    Raises:
        TypeError: for a value of the wrong type.
        ValueError: for a value out of range.
    """

    r: int
    lora_alpha: float
    lora_dropout: float
    init_lora_weights: bool

    def __post_init__(self) -> None:
        object.__setattr__(self, "r", check_count("r", self.r))
        check_number("lora_alpha", self.lora_alpha)
        if not math.isfinite(self.lora_alpha):
            raise ValueError(f"`lora_alpha` must be finite, got {self.lora_alpha}.")
        check_number("lora_dropout", self.lora_dropout)
        if not 0.0 <= self.lora_dropout < 1.0:  # NaN fails too
            raise ValueError(f"`lora_dropout` must be in [0, 1), got {self.lora_dropout}.")
        if not isinstance(self.init_lora_weights, bool):
            raise ValueError(
                f"`init_lora_weights` must be True or False, got {self.init_lora_weights!r}: "
                "AdaLoRA has one initialisation (E = 0, A and B ~ N(0, 0.02))."
            )

    @property
    def scaling(self) -> float:
        """`lora_alpha` if positive, else r. AdaLoRA does not divide alpha by r."""
        return self.lora_alpha if self.lora_alpha > 0 else float(self.r)


def check_new_name(name: str, taken: Collection[str]) -> None:
    """Refuse a name that cannot be the key of a new adapter.

    Raises:
        TypeError: if it is not a string.
        ValueError: if it is empty, has a dot, is taken, or is an attribute of `nn.ParameterDict`.
    """
    if not isinstance(name, str):
        raise TypeError(f"`adapter_name` must be a string, got {name!r} ({type(name).__name__}).")
    if not name:
        raise ValueError("`adapter_name` is empty: give a name such as 'default'.")
    if "." in name:
        raise ValueError(
            f"`adapter_name` {name!r} has a dot, which separates modules in `state_dict` keys: "
            f"use {name.replace('.', '_')!r}."
        )
    if name in taken:
        raise ValueError(
            f"There is already an adapter {name!r} (adapters: {sorted(taken)}): use another name, "
            "or `reset_lora_parameters` to start it afresh."
        )
    # `parameters["keys"] = p` would replace the method `parameters.keys`.
    if hasattr(nn.ParameterDict(), name) or hasattr(nn.ModuleDict(), name):
        raise ValueError(
            f"`adapter_name` {name!r} is an attribute of `torch.nn.ParameterDict` or "
            f"`torch.nn.ModuleDict` and cannot be a key in one: use {'adapter_' + name!r}."
        )


def check_known_names(names: Collection[str], known: Collection[str]) -> None:
    """Refuse names of adapters that do not exist, and repeated ones.

    Raises:
        ValueError: listing the adapters that exist.
    """
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ValueError(f"No adapter {', '.join(map(repr, unknown))}. Adapters: {sorted(known)}.")
    if len(set(names)) != len(names):
        raise ValueError(f"An adapter can be active once: got {list(names)}.")


def check_extra_keywords(keywords: Mapping[str, Any]) -> None:
    """Accept the keywords that PEFT passes to its layers, as long as they change nothing.

    Raises:
        TypeError: for an unknown keyword, or one that asks for what these layers do not do.
    """
    for key, value in keywords.items():
        if key in _DESCRIBE_BASE or (key in _UNSUPPORTED and value is False):
            continue
        if key in _UNSUPPORTED:
            raise TypeError(f"`{key}={value!r}` is not supported: these layers have no such mode.")
        if key == "config":
            raise TypeError(f"`config` is not taken: pass {', '.join(f'`{n}`' for n in _NAMED)}.")
        nearest = difflib.get_close_matches(key, (*_NAMED, *_UNSUPPORTED, *_DESCRIBE_BASE), n=1)
        hint = f"Did you mean `{nearest[0]}`?" if nearest else f"Known: {', '.join(_NAMED)}."
        raise TypeError(f"Unknown keyword `{key}`. {hint}")


def check_count(name: str, value: Any) -> int:
    """`value` as an int >= 0; NumPy's integers are integers, bools are not.

    Raises:
        TypeError: if it is not an integer.
        ValueError: if it is negative.
    """
    try:
        count = operator.index(value)
    except TypeError:
        count = None
    if count is None or isinstance(value, bool):
        raise TypeError(f"`{name}` must be an integer, got {value!r} ({type(value).__name__}).")
    if count < 0:
        raise ValueError(f"`{name}` must be 0 or more, got {count}.")
    return count


def check_number(name: str, value: Any) -> None:
    """Refuse what is not a real number; bools are not.

    Raises:
        TypeError: naming the value.
    """
    if type(value) is bool or not isinstance(value, Real):
        raise TypeError(f"`{name}` must be a number, got {value!r} ({type(value).__name__}).")

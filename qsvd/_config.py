"""The configuration of an AdaLoRA run: PEFT's field names and defaults, checked when it is made."""

from __future__ import annotations

import difflib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from qsvd._checks import AdapterSettings, check_count, check_number

PEFT_TYPE = "ADALORA"
CONFIG_NAME = "adapter_config.json"

# Fields of PEFT's that ask for what these layers do not do. A file may have them, saying nothing.
_NOT_OFFERED = frozenset(
    {
        "alora_invocation_tokens",
        "alpha_pattern",
        "arrow_config",
        "bias",
        "corda_config",
        "ensure_weight_tying",
        "eva_config",
        "fan_in_fan_out",
        "kasa_config",
        "layer_replication",
        "loftq_config",
        "lora_bias",
        "lora_ga_config",
        "megatron_config",
        "modules_to_save",
        "monteclora_config",
        "qalora_group_size",
        "target_parameters",
        "trainable_token_indices",
        "use_bdlora",
        "use_dora",
        "use_qalora",
        "use_rslora",
        "velora_config",
    }
)
# Fields of PEFT's whose value changes nothing here: provenance, and LoRA's own rank.
_IGNORED = frozenset({"auto_mapping", "megatron_core", "peft_type", "peft_version", "r"})
# What PEFT writes for "no" where it is not None, False or empty.
_SAYS_NOTHING: Mapping[str, object] = {"bias": "none", "qalora_group_size": 16}


@dataclass(frozen=True, kw_only=True)
class AdaLoraConfig:
    """What to adapt, with which adapters, and how their rank budget falls.

    Args:
        target_modules: names or suffixes of modules (`["q_proj", "v_proj"]`), one regular expression
            that matches whole names, or "all-linear": every quantised layer but the output head.
        exclude_modules: names, suffixes or one regular expression of modules to leave out.
        layers_to_transform: only these layers, by their number in the module's name.
        layers_pattern: what stands before that number (`"layers"`); anything, if it is not given.
        init_r: rank of each adapter at the start.
        target_r: mean rank at the end.
        tinit: steps before the budget starts to fall.
        tfinal: steps at the end during which it does not fall any more.
        deltaT: steps between two allocations.
        total_step: optimizer steps of the whole run; needed.
        beta1: decay of the moving mean of each weight's sensitivity, in (0, 1).
        beta2: decay of the moving mean of its uncertainty, in (0, 1).
        orth_reg_weight: weight of the orthogonal penalty.
        lora_alpha: the scaling if positive, else init_r; it is not divided by the rank.
        lora_dropout: probability in [0, 1) of dropping an element of an adapter's input.
        init_lora_weights: True: a new adapter changes nothing.
        rank_pattern: which ranks were kept, by parameter name, as the end of a run leaves it.
        inference_mode: the adapters are frozen.
        task_type: carried along for PEFT, as are the two that follow.
        base_model_name_or_path: the model that was adapted.
        revision: of that model.

    Raises:
        TypeError: for an unknown field, with the nearest known one, or a value of the wrong type.
        ValueError: for a value out of range, or a schedule that leaves no step for the budget to fall.
    """

    target_modules: str | Sequence[str] | None = None
    exclude_modules: str | Sequence[str] | None = None
    layers_to_transform: int | Sequence[int] | None = None
    layers_pattern: str | Sequence[str] | None = None
    init_r: int = 12
    target_r: int = 8
    tinit: int = 0
    tfinal: int = 0
    deltaT: int = 1
    total_step: int | None = None
    beta1: float = 0.85
    beta2: float = 0.85
    orth_reg_weight: float = 0.5
    lora_alpha: float = 8
    lora_dropout: float = 0.0
    init_lora_weights: bool = True
    rank_pattern: Mapping[str, Sequence[bool]] | None = None
    inference_mode: bool = False
    task_type: str | None = None
    base_model_name_or_path: str | None = None
    revision: str | None = None

    def __new__(cls, **given: Any) -> AdaLoraConfig:
        unknown = [key for key in given if key not in cls.__dataclass_fields__]
        if unknown:
            raise TypeError(_unknown_field(unknown[0], given[unknown[0]]))
        return super().__new__(cls)

    def __post_init__(self) -> None:
        # A set, as PEFT has it, would be written in another order each time.
        for name in ("target_modules", "exclude_modules", "layers_pattern"):
            object.__setattr__(self, name, _names(name, getattr(self, name)))
        object.__setattr__(self, "layers_to_transform", _numbers(self.layers_to_transform))
        for name in ("init_r", "target_r", "tinit", "tfinal", "deltaT"):
            object.__setattr__(self, name, check_count(name, getattr(self, name)))
        AdapterSettings(self.init_r, self.lora_alpha, self.lora_dropout, self.init_lora_weights)
        self._check_schedule()
        self._check_weights()
        self._check_layers()
        self._check_pattern()

    def _check_schedule(self) -> None:
        if self.total_step is None:
            raise ValueError(
                "`total_step` is needed: the budget falls over the optimizer steps of the whole run."
            )
        object.__setattr__(self, "total_step", check_count("total_step", self.total_step))
        if self.deltaT < 1:
            raise ValueError(f"`deltaT` must be 1 or more, got {self.deltaT}.")
        if self.target_r > self.init_r:
            raise ValueError(
                f"`target_r` must not exceed `init_r`, got {self.target_r} > {self.init_r}: "
                "the budget only falls."
            )
        if self.tinit + self.tfinal >= self.total_step:
            raise ValueError(
                f"`tinit` + `tfinal` must be less than `total_step`, got {self.tinit} + "
                f"{self.tfinal} >= {self.total_step}: no step is left for the budget to fall."
            )

    def _check_weights(self) -> None:
        for name in ("beta1", "beta2"):
            value = getattr(self, name)
            check_number(name, value)
            if not 0.0 < value < 1.0:  # NaN fails too
                raise ValueError(f"`{name}` must be between 0 and 1, got {value}.")
        check_number("orth_reg_weight", self.orth_reg_weight)
        if not 0.0 <= self.orth_reg_weight < float("inf"):
            raise ValueError(
                f"`orth_reg_weight` must be finite and not negative, got {self.orth_reg_weight}."
            )

    def _check_layers(self) -> None:
        if self.layers_to_transform is not None and isinstance(self.target_modules, str):
            raise ValueError(
                "`layers_to_transform` goes with a list of `target_modules`, not with "
                f"{self.target_modules!r}: let the expression say which layers."
            )
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError("`layers_pattern` says nothing without `layers_to_transform`.")

    def _check_pattern(self) -> None:
        if self.rank_pattern is None:
            return
        if not isinstance(self.rank_pattern, Mapping):
            raise TypeError(f"`rank_pattern` must be a mapping, got {self.rank_pattern!r}.")
        for name, kept in self.rank_pattern.items():
            if not isinstance(kept, Sequence) or not all(type(one) is bool for one in kept):
                raise TypeError(
                    f"`rank_pattern[{name!r}]` must be a list of booleans, got {kept!r}."
                )

    def to_dict(self) -> dict[str, Any]:
        """The fields as PEFT's adapter_config.json has them, `peft_type` among them."""
        return {"peft_type": PEFT_TYPE, **asdict(self)}

    @classmethod
    def from_dict(cls, given: Mapping[str, Any]) -> AdaLoraConfig:
        """Read what `to_dict`, or PEFT, wrote.

        Args:
            given: by PEFT's field names. Fields that are not known here may say nothing (None, False,
                empty), as newer releases of PEFT write them.

        Raises:
            ValueError: for another PEFT type, or a field that asks for what these layers do not do;
                and as the constructor.
            TypeError: as the constructor.
        """
        kind = given.get("peft_type", PEFT_TYPE)
        if kind != PEFT_TYPE:
            raise ValueError(f"`peft_type` is {kind!r}: expected {PEFT_TYPE!r}.")
        known = {}
        for key, value in given.items():
            if key in cls.__dataclass_fields__:
                known[key] = value
            elif key in _IGNORED or not value or _SAYS_NOTHING.get(key) == value:
                continue  # newer releases of PEFT have fields that are not known here
            elif key in _NOT_OFFERED:
                raise ValueError(f"`{key}={value!r}` is not offered by AdaLoRA over these layers.")
            else:
                raise TypeError(_unknown_field(key, value))
        return cls(**known)

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike[str]) -> AdaLoraConfig:
        """Read the `adapter_config.json` of a folder that `qsvd.save_adapter` or PEFT wrote.

        Args:
            folder: local; nothing is downloaded.

        Raises:
            FileNotFoundError: if there is none.
            ValueError: if it is not one of AdaLoRA's, naming the file.
        """
        path = Path(folder) / CONFIG_NAME
        return cls.from_json(path.read_bytes(), path)

    @classmethod
    def from_json(cls, content: bytes, path: Path) -> AdaLoraConfig:
        """Read the content of a configuration's file.

        Args:
            content: JSON, in UTF-8.
            path: of the file, for what errors say.

        Raises:
            ValueError: if it is not one of AdaLoRA's.
        """
        try:
            given = json.loads(content.decode("utf-8"))
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"{path} is not JSON: {error}.") from None
        if not isinstance(given, dict):
            raise ValueError(f"{path} holds a {type(given).__name__}; expected an object.")
        try:
            return cls.from_dict(given)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path}: {error}") from None


def _unknown_field(key: str, value: object) -> str:
    if key in _NOT_OFFERED:
        return f"`{key}={value!r}` is not offered by AdaLoRA over these layers."
    known = [field.name for field in fields(AdaLoraConfig)]
    nearest = difflib.get_close_matches(key, known, n=1)
    hint = f"Did you mean `{nearest[0]}`?" if nearest else f"Known: {', '.join(known)}."
    return f"Unknown field `{key}`. {hint}"


def _names(field: str, value: Any) -> str | tuple[str, ...] | None:
    """One text as it is; several as a tuple, sorted if they come as a set."""
    if value is None or isinstance(value, str):
        return value
    try:
        names = sorted(value) if isinstance(value, (set, frozenset)) else list(value)
    except TypeError:
        names = [value]
    if not all(isinstance(name, str) for name in names):
        raise TypeError(f"`{field}` must be a string or strings, got {value!r}.")
    return tuple(names)


def _numbers(value: Any) -> int | tuple[int, ...] | None:
    if value is None or isinstance(value, int):
        return None if value is None else check_count("layers_to_transform", value)
    try:
        return tuple(check_count("layers_to_transform", number) for number in value)
    except TypeError:
        raise TypeError(
            f"`layers_to_transform` must be a layer's number or several, got {value!r}."
        ) from None

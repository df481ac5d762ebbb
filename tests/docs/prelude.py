"""What the code blocks of our pages find when they run: small real objects under the names they use."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.qsvd.language import quantised, sequences, write_model

MODEL = "my-model"  # a folder where a reader has a name on the hub, or a folder


class Prelude:
    """The names that a block may use without defining them, made anew for each block that does.

    model, base_model: a causal language model in 4 bits, without adapters.
    batches: what such a model is called with, its labels among it.
    dataset: the same texts one by one, for transformers' Trainer.
    """

    def __init__(self, folder: Path) -> None:
        self._target = folder

    def names_for(self, text: str) -> Mapping[str, Any]:
        """The names that a block's text has, by what they stand for."""
        makers: dict[str, Callable[[], Any]] = {
            "model": lambda: quantised(self.folder),
            "base_model": lambda: quantised(self.folder),
            "batches": lambda: [{"input_ids": t, "labels": t} for t in self._tokens.split(4)] * 3,
            "dataset": lambda: sequences(16),
        }
        wanted = {name for name in makers if re.search(rf"\b{name}\b", text)}
        if MODEL in text:
            assert self.folder.is_dir()
        return {name: makers[name]() for name in wanted}

    @cached_property
    def folder(self) -> Path:
        """Where the model lies that `from_pretrained` is given."""
        return write_model(self._target / MODEL)

    @property
    def _tokens(self) -> Tensor:
        return torch.stack([text["input_ids"] for text in sequences(16)])

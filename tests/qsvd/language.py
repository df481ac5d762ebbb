"""A causal language model of a few thousand weights, saved in a folder and loaded quantised from it."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qsvd import AdaLoraConfig
from tests.qsvd.build import Kind

VOCABULARY, LENGTH = 64, 16
TARGETS = ("q_proj", "v_proj", "down_proj")
LAYERS = 2 * len(TARGETS)  # adapted ones


def write_model(folder: Path) -> Path:
    """Save a randomly initialised Llama of two blocks, as `from_pretrained` reads it."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    shape = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=LENGTH,
        initializer_range=0.1,  # so that the frozen head has something to say
        bos_token_id=None,
        eos_token_id=None,
    )
    LlamaForCausalLM(shape).save_pretrained(folder)
    return folder


def quantised(folder: Path, kind: Kind = "4bit") -> Any:
    """The model of a folder through transformers' own quantiser."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    how = (
        BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
        if kind == "4bit"
        else BitsAndBytesConfig(load_in_8bit=True)
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what transformers deprecates of itself
        return AutoModelForCausalLM.from_pretrained(
            folder, quantization_config=how, device_map={"": "cpu"}, dtype=torch.float32
        )


def config(**given: Any) -> AdaLoraConfig:
    defaults: dict[str, Any] = {
        "total_step": 12,
        "tinit": 1,
        "tfinal": 3,
        "init_r": 4,
        "target_r": 2,
        "lora_alpha": 16,
        "target_modules": TARGETS,
    }
    return AdaLoraConfig(**{**defaults, **given})


def sequences(count: int = 64) -> list[dict[str, Tensor]]:
    """Texts with something to learn: each token follows from the one before by one of three rules."""
    generator = torch.Generator().manual_seed(3)
    start = torch.randint(VOCABULARY, (count, 1), generator=generator)
    stride = torch.randint(1, 4, (count, 1), generator=generator)
    tokens = (start + stride * torch.arange(LENGTH)) % VOCABULARY
    return [{"input_ids": row, "labels": row} for row in tokens]

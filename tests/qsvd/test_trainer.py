"""The Trainer's callback: right moment, accumulation, logs, checkpoints that resume, and refusals."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import qsvd
from qsvd import RankAllocator
from qsvd.integrations.transformers import RankAllocatorCallback
from tests.qsvd.language import LAYERS, config, quantised, sequences, write_model

STEPS = 12


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"))


def prepared(folder: Path, **given: Any) -> tuple[Any, RankAllocatorCallback]:
    """The same adapted model each time, and its callback."""
    settings = config(**given)
    base = quantised(folder)
    torch.manual_seed(1)
    model = qsvd.adapt(base, settings)
    return model, RankAllocatorCallback(model, settings)


def trainer(model: Any, callback: RankAllocatorCallback, out: Path, **options: Any) -> Any:
    from transformers import Trainer, TrainingArguments

    defaults: dict[str, Any] = {
        "max_steps": STEPS,
        "per_device_train_batch_size": 8,
        "learning_rate": 5e-2,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
        "dataloader_pin_memory": False,
    }
    arguments = TrainingArguments(str(out), **{**defaults, **options})
    data = {"train_dataset": sequences(), "eval_dataset": sequences(8)}
    return Trainer(model, arguments, callbacks=[callback], **data)


def train(it: Any, **options: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what transformers and accelerate deprecate of themselves
        return it.train(**options)


def parameters(model: Any) -> dict[str, Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters() if "lora_" in n}


def assert_same(one: dict[str, Tensor], two: dict[str, Tensor]) -> None:
    assert one.keys() == two.keys()
    for name, value in one.items():
        assert torch.equal(value, two[name]), name


@pytest.mark.parametrize("pieces", [1, 4])
def test_a_run_is_the_loop_written_by_hand(folder: Path, tmp_path: Path, pieces: int) -> None:
    """Bit for bit, whether a step sees its 8 texts at once or accumulates gradients of its pieces."""
    size = 8 // pieces
    model, callback = prepared(folder)
    settings = callback.allocator.config
    options = {"per_device_train_batch_size": size, "gradient_accumulation_steps": pieces}
    train(trainer(model, callback, tmp_path, train_sampling_strategy="sequential", **options))

    torch.manual_seed(1)
    other = qsvd.adapt(quantised(folder), settings)
    allocator = RankAllocator(other, settings)
    weights = [p for p in other.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=5e-2, weight_decay=0.0, fused=True)
    tokens = torch.stack([text["input_ids"] for text in sequences()])
    other.train()
    for step in range(1, STEPS + 1):
        for batch in tokens.roll(-8 * (step - 1), 0)[:8].split(size):
            # The loss that the Trainer asks for: a sum, over the targets of the whole step.
            count = torch.tensor(8 * (tokens.shape[1] - 1))
            other(batch, labels=batch, num_items_in_batch=count).loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        (settings.orth_reg_weight * qsvd.orthogonal_penalty(other)).backward()
        optimizer.step()
        allocator.step(step)
        optimizer.zero_grad()

    assert callback.step == STEPS
    assert callback.allocator.rank_pattern == allocator.rank_pattern
    assert sum(allocator.ranks.values()) == 2 * LAYERS
    assert_same(parameters(model), parameters(other))


def test_the_logs_tell_budget_and_ranks(folder: Path, tmp_path: Path) -> None:
    model, callback = prepared(folder)
    it = trainer(model, callback, tmp_path)
    train(it)

    steps = [entry for entry in it.state.log_history if "loss" in entry]
    schedule = callback.allocator.schedule
    assert [entry["budget"] for entry in steps] == [
        schedule.budget(step) for step in range(1, STEPS + 1)
    ]
    assert steps[0]["mean_rank"] == 4
    assert steps[-1]["mean_rank"] == 2
    assert steps[-1]["ranks"] == callback.allocator.ranks
    assert steps[-1]["min_rank"] == min(callback.allocator.ranks.values())
    assert "train_loss" in it.state.log_history[-1]
    assert "budget" not in it.state.log_history[-1]


@pytest.mark.parametrize("saved_at", [4, 10], ids=["falling", "settled"])
def test_a_resumed_run_goes_on_bit_for_bit(saved_at: int, folder: Path, tmp_path: Path) -> None:
    options = {"save_strategy": "steps", "save_steps": saved_at, "per_device_train_batch_size": 4}
    model, callback = prepared(folder, lora_dropout=0.1)
    train(trainer(model, callback, tmp_path, **options))
    torch.manual_seed(99)
    settings = callback.allocator.config
    again = qsvd.adapt(quantised(folder), settings)  # other random numbers
    resumed = RankAllocatorCallback(again, settings)

    train(
        trainer(again, resumed, tmp_path, **options),
        resume_from_checkpoint=str(tmp_path / f"checkpoint-{saved_at}"),
    )

    assert resumed.step == STEPS
    assert resumed.allocator.rank_pattern == callback.allocator.rank_pattern
    assert_same(parameters(again), parameters(model))


def test_a_checkpoint_is_an_adapter_of_pefts_and_ours(folder: Path, tmp_path: Path) -> None:
    import peft

    model, callback = prepared(folder)
    it = trainer(model, callback, tmp_path, save_strategy="steps", save_steps=6)
    train(it)
    it.save_model(str(tmp_path / "final"))
    last, final = tmp_path / "checkpoint-12", tmp_path / "final"
    tokens = sequences()[0]["input_ids"][None]

    assert sorted(p.name for p in final.glob("*.safetensors")) == ["adapter_model.safetensors"]
    assert (last / "model.safetensors").stat().st_size < 200_000  # no base model
    with torch.no_grad():
        expected = model.train()(tokens).logits
        for place in (last, final):
            ours = qsvd.load_adapter(quantised(folder), place).train()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                theirs = peft.PeftModel.from_pretrained(quantised(folder), str(place)).train()
            for loaded in (ours, theirs):
                off = (loaded(tokens).logits - expected).abs().max()
                assert off <= 4096 * 2.0**-24 * expected.abs().max()


def test_the_best_checkpoint_is_loaded_with_its_ranks(folder: Path, tmp_path: Path) -> None:
    model, callback = prepared(folder)
    options = {
        "save_strategy": "steps",
        "save_steps": 4,
        "eval_strategy": "steps",
        "eval_steps": 4,
        "load_best_model_at_end": True,
        "greater_is_better": True,  # the worst one, which is the first
        "metric_for_best_model": "loss",
    }
    it = trainer(model, callback, tmp_path, **options)
    train(it)

    assert it.state.best_model_checkpoint.endswith("checkpoint-4")
    assert callback.step == 4
    assert sum(callback.allocator.ranks.values()) == callback.allocator.schedule.budget(4)
    alive = sum(int(p.count_nonzero()) for n, p in parameters(model).items() if "lora_E" in n)
    assert alive == callback.allocator.schedule.budget(4)


def test_detach_makes_the_model_transformers_own_again(folder: Path, tmp_path: Path) -> None:
    model, callback = prepared(folder)
    with pytest.raises(ValueError, match="has a callback already"):
        RankAllocatorCallback(model, callback.allocator.config)

    callback.detach()

    assert "save_pretrained" not in model.__dict__
    with pytest.raises(ValueError, match="purely quantized"):
        trainer(model, callback, tmp_path)
    RankAllocatorCallback(model, callback.allocator.config)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_steps": 5}, "will take 5 optimizer steps, and the budget falls until step 9"),
        ({"deepspeed": True}, "DeepSpeed keeps"),
        ({"fsdp": "full_shard"}, "holds a shard of the adapter: use DDP"),
        ({"fp16": True, "max_grad_norm": 0.0}, "set `max_grad_norm`"),
    ],
)
def test_a_run_that_cannot_end_well_is_refused(
    options: dict[str, Any], message: str, folder: Path
) -> None:
    from types import SimpleNamespace

    _, callback = prepared(folder)
    given = {"deepspeed": None, "fsdp": None, "fp16": False, "max_grad_norm": 1.0, **options}
    state = SimpleNamespace(max_steps=given.pop("max_steps", STEPS), global_step=0)
    with pytest.raises(ValueError, match=message):
        callback.on_train_begin(SimpleNamespace(**given), state, None)


def test_a_checkpoint_without_the_allocators_state_is_refused(folder: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    options = {"save_strategy": "steps", "save_steps": 6}
    model, callback = prepared(folder)
    train(trainer(model, callback, tmp_path, **options))
    path = tmp_path / "checkpoint-6" / "model.safetensors"
    state = load_file(path)
    save_file({k: v for k, v in state.items() if "qsvd_allocator" not in k}, path)

    again = trainer(*prepared(folder), tmp_path, **options)
    with pytest.raises(ValueError, match="starts at step 6, the allocator is at 0"):
        train(again, resume_from_checkpoint=str(path.parent))

    del state["model.layers.0.self_attn.q_proj.lora_E.default"]
    save_file(state, path)
    again = trainer(*prepared(folder), tmp_path, **options)
    with pytest.raises(ValueError, match=r"lacks 'model\.layers\.0\.self_attn\.q_proj\.lora_E"):
        train(again, resume_from_checkpoint=str(path.parent))


def test_options_without_a_meaning_are_refused(folder: Path, tmp_path: Path) -> None:
    model, _ = prepared(folder)
    with pytest.raises(TypeError, match="does not take `push_to_hub`"):
        model.save_pretrained(tmp_path, push_to_hub=True)
    model.save_pretrained(tmp_path / "no", is_main_process=False)
    assert not (tmp_path / "no").exists()

"""The run of `finetune.py` with PEFT in the place of qsvd; an arrow marks the lines that change.

    pip install -e ".[examples]" && python examples/finetune_with_peft.py [--accelerate]

With `--accelerate` PEFT's model, allocator and files stay, and its layers compute as qsvd's do. The
adapters start with the values that `finetune.py` draws, so the runs can be compared step by step.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import peft
import torch
from code_search import batches_of, load_model, read_pairs, recall, search_loss, split
from finetune import LEARNING_RATE, configure
from history import WINDOW, History, steps_of
from torch import Tensor, nn

import qsvd
from qsvd.integrations.peft import accelerate


def train(
    model: nn.Module,
    config: qsvd.AdaLoraConfig,
    batches: Iterator[dict[str, Tensor]],
    history: History,
    start: Mapping[str, Tensor],
    accelerated: bool = False,
) -> peft.PeftModel:
    """The loop as PEFT's documentation has it; `start` are the adapters' first values."""
    model = peft.get_peft_model(model, peft.AdaLoraConfig(**options_of(config)))  # <- adapt
    model.base_model.model.load_state_dict(start, strict=False)
    if accelerated:
        accelerate(model)
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=LEARNING_RATE
    )
    for step in steps_of(history, config.total_step):
        # `base_model` adds the penalty to the loss; without a task type, PEFT's model calls past it
        # (docs/defects/peft_orthogonal_term_needs_a_task_type.py).
        output = model.base_model(**next(batches))  # <- model and orthogonal_penalty
        output.loss.backward()
        optimizer.step()
        model.base_model.update_and_allocate(step)  # <- allocator.step
        optimizer.zero_grad()
        budget, _ = model.base_model.rankallocator.budget_schedule(step)
        history.note(search_loss(output.embeddings.detach()), budget, ranks_of(model))
    return model


def options_of(config: qsvd.AdaLoraConfig) -> dict[str, object]:
    """The configuration's fields, which are PEFT's, as arguments for PEFT."""
    return {k: v for k, v in config.to_dict().items() if v is not None and k != "peft_type"}


def first_values(config: qsvd.AdaLoraConfig, seed: int = 0) -> dict[str, Tensor]:
    """The adapters as `finetune.py` starts with them: PEFT draws its own in another order."""
    torch.manual_seed(seed)
    model = qsvd.adapt(load_model(), config)
    return {name: value for name, value in model.state_dict().items() if ".lora_" in name}


def ranks_of(model: peft.PeftModel) -> dict[str, int]:
    """How many ranks PEFT's last allocation left to each layer; all of them before one."""
    config = model.peft_config["default"]
    layers = {
        name.removeprefix("base_model.model."): config.init_r
        for name, module in model.named_modules()
        if isinstance(module, peft.tuners.adalora.AdaLoraLayer)
    }
    for name, kept in (config.rank_pattern or {}).items():
        layer = name.removeprefix("base_model.model.").removesuffix(".lora_E.default")
        layers[layer] = sum(kept)
    return layers


def main(arguments: Sequence[str] | None = None) -> History:
    options = parse(arguments)
    seen, held_out = split(read_pairs()[: options.texts])
    model = load_model()
    history = History(recall_before=recall(model, held_out))

    config = configure(options.steps)
    batches = batches_of(seen, options.batch, model.device)
    model = train(model, config, batches, history, first_values(config), options.accelerate)

    history.recall_after = recall(model, held_out)
    model.save_pretrained(options.folder)
    history.save(options.folder / "history.json")
    print(f"loss             {history.mean_loss(WINDOW):.3f} -> {history.mean_loss(-WINDOW):.3f}")
    print(f"recall, held out {history.recall_before:.2f} -> {history.recall_after:.2f}")
    return history


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--accelerate", action="store_true", help="let qsvd compute PEFT's layers")
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--batch", type=int, default=16, help="pairs in a batch")
    parser.add_argument("--texts", type=int, help="use only so many pairs, to try it quickly")
    parser.add_argument("--folder", type=Path, default=Path("finetuned-with-peft"))
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()

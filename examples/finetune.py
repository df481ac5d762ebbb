"""Fine-tune a real 4-bit encoder with AdaLoRA, and see where the rank goes.

    pip install -e ".[examples]" && python examples/finetune.py

`main` is the recipe, and `train` the loop. The task, searching code, is in `code_search.py`; what is
shown and plotted in `history.py`. `finetune_with_peft.py` is the same run with PEFT, and
docs/finetune.md has both side by side.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from code_search import Pair, batches_of, encode, load_model, read_pairs, recall, split
from history import WINDOW, History, plot_ranks, steps_of
from peft import PeftModel
from torch import Tensor, nn

import qsvd
from qsvd import AdaLoraConfig, RankAllocator

LEARNING_RATE = 2e-3


def configure(steps: int) -> AdaLoraConfig:
    """Every linear layer of the encoder starts with 8 ranks, and 4 are left on average."""
    return AdaLoraConfig(
        target_modules=["query", "key", "value", "dense"],
        init_r=8,
        target_r=4,
        lora_alpha=16,
        orth_reg_weight=0.1,
        total_step=steps,
        # At first no rank is taken away: all singular values start at zero, and have to show what
        # they are good for. Then the budget falls, and in the last quarter it stays where it is, so
        # that what is left can settle.
        tinit=steps // 8,
        tfinal=steps // 4,
        deltaT=5,
    )


def train(
    model: nn.Module, config: AdaLoraConfig, batches: Iterator[dict[str, Tensor]], history: History
) -> None:
    """The loop: what AdaLoRA adds to any other are the penalty and the allocator's step."""
    qsvd.adapt(model, config)  # quantised layers replaced in place, all else frozen
    allocator = RankAllocator(model, config)
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=LEARNING_RATE
    )
    for step in steps_of(history, config.total_step):
        loss = model(**next(batches)).loss
        # A triplet's singular value tells its importance only if its vectors are orthonormal.
        penalty = qsvd.orthogonal_penalty(model)
        (loss + config.orth_reg_weight * penalty).backward()
        optimizer.step()
        # After the optimizer, which would move masked values away from zero, and before zero_grad:
        # importance is read off the gradients.
        budget = allocator.step(step)
        optimizer.zero_grad()
        history.note(loss, budget, allocator.ranks)


@torch.no_grad()
def difference_in_peft(model: nn.Module, folder: Path, pairs: Sequence[Pair]) -> float:
    """The largest difference of an embedding between the model and what PEFT makes of its files."""
    with warnings.catch_warnings():
        # PEFT says that it ignores the `rank_pattern` of a pruned adapter, which it does not, and
        # transformers announces what PEFT will have to call otherwise.
        warnings.simplefilter("ignore")
        loaded = PeftModel.from_pretrained(load_model(), str(folder)).train()
    tokens = encode(pairs, next(model.parameters()).device)
    return (model(**tokens).embeddings - loaded(**tokens).embeddings).abs().max().item()


def main(arguments: Sequence[str] | None = None) -> History:
    options = parse(arguments)
    options.folder.mkdir(parents=True, exist_ok=True)
    seen, held_out = split(read_pairs()[: options.texts])
    model = load_model()
    history = History(recall_before=recall(model, held_out))

    torch.manual_seed(0)  # for the adapters' first values
    train(model, configure(options.steps), batches_of(seen, options.batch, model.device), history)

    history.recall_after = recall(model, held_out)
    qsvd.save_adapter(model, options.folder)
    history.save(options.folder / "history.json")
    plot_ranks(history, options.folder / "ranks.svg")
    difference = difference_in_peft(model, options.folder, held_out)
    print(f"loss             {history.mean_loss(WINDOW):.3f} -> {history.mean_loss(-WINDOW):.3f}")
    print(f"recall, held out {history.recall_before:.2f} -> {history.recall_after:.2f}")
    print(f"ranks            {sum(history.ranks[0].values())} -> {sum(history.ranks[-1].values())}")
    print(
        f"adapter          in {options.folder}; loaded by PEFT, embeddings within {difference:.1e}"
    )
    return history


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--steps", type=int, default=120, help="of the optimizer (120)")
    parser.add_argument("--batch", type=int, default=16, help="pairs in a batch (16)")
    parser.add_argument("--texts", type=int, help="use only so many pairs, to try it quickly")
    parser.add_argument(
        "--folder", type=Path, default=Path("finetuned"), help="for what is written (finetuned)"
    )
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()

"""Train an adapter on several processes, with checkpoints that any number of processes goes on from.

    torchrun --standalone --nproc-per-node 2 --max-restarts 3 examples/distributed.py --engine fsdp2

`train` is the recipe, the same for DistributedDataParallel and FSDP2. If a process dies, torchrun starts
all of them again, and they go on from the last checkpoint: `--die-at 9` shows it. The model and
its task are stand-ins that need no download.
"""

from __future__ import annotations

import argparse
import gc
import os
import shutil
import signal
from pathlib import Path

import torch
from bitsandbytes.nn import Linear4bit
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import qsvd
from qsvd import AdaLoraConfig, RankAllocator

WIDTH, ROWS = 64, 16
CONFIG = AdaLoraConfig(
    target_modules="all-linear",
    init_r=6,
    target_r=3,
    total_step=16,
    tinit=2,
    tfinal=4,
    lora_alpha=16,
    orth_reg_weight=0.1,
)
WHOLE = StateDictOptions(full_state_dict=True)  # of the optimizer: no trace of how many share it


class Block(nn.Module):
    """A residual block of two quantised layers."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up = Linear4bit(WIDTH, 2 * WIDTH, quant_type="nf4")
        self.down = Linear4bit(2 * WIDTH, WIDTH, quant_type="nf4")

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.relu(self.up(self.norm(x))))


def load_base() -> nn.Sequential:
    """The quantised base model, the same on every process, as `from_pretrained` would give it."""
    torch.manual_seed(0)
    return nn.Sequential(*(Block() for _ in range(3))).to(device())


def device() -> torch.device:
    """This process' GPU, if there are any."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ["LOCAL_RANK"]))


def batch(step: int) -> tuple[Tensor, Tensor]:
    """This process' part of a step's batch. The whole does not depend on how many share it."""
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(ROWS, WIDTH, generator=generator)
    wanted = x.roll(1, dims=1)
    rank, world = dist.get_rank(), dist.get_world_size()
    return x.chunk(world)[rank].to(device()), wanted.chunk(world)[rank].to(device())


def spread(model: nn.Sequential, engine: str) -> nn.Module:
    """Share an adapted model between the processes."""
    if engine == "ddp":
        return DistributedDataParallel(model)
    for block in model:
        fully_shard(block)
    fully_shard(model)
    return model


def save_checkpoint(
    folder: Path,
    step: int,
    model: nn.Module,
    allocator: RankAllocator,
    optimizer: torch.optim.Optimizer,
) -> None:
    """Write `step-N`, whole or not at all. Every process takes part: each may hold shards."""
    part, place = folder / "part", folder / f"step-{step}"
    if dist.get_rank() == 0:
        shutil.rmtree(part, ignore_errors=True)  # of a run that was killed
    qsvd.save_adapter(model, part, prune=False)  # masked triplets too: they may return
    training = {
        "step": step,
        "allocator": allocator.state_dict(),
        "optimizer": get_optimizer_state_dict(model, optimizer, options=WHOLE),
    }
    if dist.get_rank() == 0:
        torch.save(training, part / "training.pt")
        part.rename(place)  # at once: `last_checkpoint` never sees half of it
    dist.barrier()


def last_checkpoint(folder: Path) -> Path | None:
    """The newest complete one."""
    found = {int(path.name.removeprefix("step-")): path for path in folder.glob("step-*")}
    return found[max(found)] if found else None


def train(folder: Path, engine: str, until: int, die_at: int = 0) -> dict[str, int]:
    """Train up to step `until`, from the last checkpoint of `folder` if there is one.

    Returns:
        The rank that each layer is left with.
    """
    checkpoint = last_checkpoint(folder)
    base = load_base()
    if checkpoint is None:
        torch.manual_seed(1)  # `fully_shard` takes each process' own rows: let all draw the same
        adapted = qsvd.adapt(base, CONFIG)
    else:
        adapted = qsvd.load_adapter(base, checkpoint, trainable=True)

    model = spread(adapted, engine)
    weights = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=5e-3)
    allocator = RankAllocator(model, CONFIG)
    done = 0
    if checkpoint is not None:
        training = torch.load(checkpoint / "training.pt", weights_only=True)
        set_optimizer_state_dict(model, optimizer, training["optimizer"], options=WHOLE)
        allocator.load_state_dict(training["allocator"])
        done = training["step"]

    model.train()
    for step in range(done + 1, until + 1):
        x, wanted = batch(step)
        loss = (model(x) - wanted).pow(2).mean()
        (loss + CONFIG.orth_reg_weight * qsvd.orthogonal_penalty(model)).backward()
        if step == die_at:
            os.kill(os.getpid(), signal.SIGKILL)
        optimizer.step()
        allocator.step(step)
        optimizer.zero_grad()
        if step % 4 == 0:
            save_checkpoint(folder, step, model, allocator, optimizer)
    qsvd.save_adapter(model, folder / "adapter")
    return allocator.ranks


def join() -> int:
    """Join the others, and say how often torchrun has restarted them.

    torchrun (2.13) keeps one store for all restarts, in which the addresses of the dead are found
    still: each start takes a part of it for itself.
    """
    restarts = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
    store, rank, world = next(dist.rendezvous("env://"))
    store = dist.PrefixStore(f"start {restarts}", store)
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=world)
    if torch.cuda.is_available():
        torch.cuda.set_device(device())
    return restarts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--engine", choices=["ddp", "fsdp2"], default="ddp")
    parser.add_argument("--folder", type=Path, default=Path("run"))
    parser.add_argument("--die-at", type=int, default=0, help="kill the last process there, once")
    given = parser.parse_args()

    restarts = join()
    last = dist.get_rank() == dist.get_world_size() - 1
    die_at = given.die_at if last and restarts == 0 else 0
    ranks = train(given.folder, given.engine, CONFIG.total_step, die_at)
    if dist.get_rank() == 0:
        print(f"restarts: {restarts}, ranks: {ranks}")
    # A DDP model that outlives its group may wait for ever for gloo's thread, which waits for Python.
    gc.collect()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()

"""Training runs that any number of processes do: alone, with DistributedDataParallel, or with FSDP2."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard
from torch.nn.parallel import DistributedDataParallel

import qsvd
from qsvd import AdaLoraConfig, RankAllocator
from qsvd._gathering import whole
from tests.qsvd.build import Kind
from tests.qsvd.models import WIDTH, stack

ROWS = 8  # of a global batch
PARTS = ("lora_A", "lora_E", "lora_B")


@dataclass(frozen=True)
class Plan:
    """What to train, and how; the same on every process."""

    kind: Kind = "4bit"
    steps: int = 8
    penalty: float = 0.0
    optimizer: str = "adamw"
    pieces: int = 1  # a process' part of the batch is taken in so many
    seed: int = 0  # of the order of a batch's rows
    settings: tuple[tuple[str, Any], ...] = ()  # of the configuration, beside the following

    @property
    def config(self) -> AdaLoraConfig:
        given: dict[str, Any] = {
            "total_step": 8,
            "tinit": 1,
            "tfinal": 2,
            "init_r": 4,
            "target_r": 2,
            "lora_alpha": 16,
            "target_modules": ["q_proj", "v_proj"],
            "init_lora_weights": False,
        }
        return AdaLoraConfig(**{**given, **dict(self.settings)})


@dataclass
class Outcome:
    """Of one run: the allocator's state after every step, and the weights at the end, whole."""

    states: list[dict[str, Any]]
    weights: dict[str, Tensor]


def adapted(plan: Plan) -> nn.Module:
    """The model before any training, the same each time."""
    base = stack(plan.kind, depth=2)
    torch.manual_seed(1)
    return qsvd.adapt(base, plan.config).train()


def batch(step: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """The global batch of a step, (8, 5, 64) and what is wanted of it, its rows in any order."""
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(ROWS, 5, WIDTH, generator=generator)
    wanted = torch.randn(ROWS, 5, WIDTH, generator=generator)
    order = torch.arange(ROWS)
    if seed:
        order = torch.randperm(ROWS, generator=torch.Generator().manual_seed(seed))
    return x[order], wanted[order]


def part(rank: int, world: int, step: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """One process' rows of it."""
    x, wanted = batch(step, seed)
    return x.chunk(world)[rank], wanted.chunk(world)[rank]


def loss_of(model: Callable[[Tensor], Tensor], x: Tensor, wanted: Tensor) -> Tensor:
    """A mean over rows, so that the mean over equal parts is that of the whole batch."""
    return (model(x) - wanted).pow(2).mean()


def optimizer_of(plan: Plan, model: nn.Module) -> torch.optim.Optimizer:
    weights = [p for p in model.parameters() if p.requires_grad]
    if plan.optimizer == "adamw":
        return torch.optim.AdamW(weights, lr=2e-2)
    return torch.optim.SGD(weights, lr=2e-1, momentum=0.5)


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    """The adapter's weights, whole: asked of all processes."""
    weights = {
        f"{name}.{part}": getattr(layer, part)["default"].detach()
        for name, layer in qsvd.adapted_layers(model).items()
        for part in PARTS
    }
    return {n: w.clone() for n, w in zip(weights, whole(list(weights.values())), strict=True)}


def save_with_empty_layers(plan: Plan, folder: Path) -> dict[str, int]:
    """Save an adapter whose budget went to the last layers, each of which has larger gradients.

    Returns:
        The rank of each layer.
    """
    model = adapted(plan)
    allocator = RankAllocator(model, plan.config)
    for number, layer in enumerate(qsvd.adapted_layers(model).values()):
        for parameters in (layer.lora_A, layer.lora_E, layer.lora_B):
            parameters["default"].grad = torch.ones_like(parameters["default"]) * 100.0**number
    allocator.step(0)
    allocator.step(6)
    qsvd.save_adapter(model, folder)
    return allocator.ranks


def train(
    plan: Plan,
    model: nn.Module,
    allocator: RankAllocator,
    optimizer: torch.optim.Optimizer,
    steps: Sequence[int],
    rank: int = 0,
    world: int = 1,
) -> Outcome:
    """Some steps of a plan, on this process' part of each batch.

    Accumulated pieces are summed without talking to the others until the last, where that is known.
    """
    states = []
    for step in steps:
        x, wanted = part(rank, world, step, plan.seed)
        pieces = list(zip(x.chunk(plan.pieces), wanted.chunk(plan.pieces), strict=True))
        for number, (x_i, wanted_i) in enumerate(pieces):
            last = number == len(pieces) - 1
            silent = isinstance(model, DistributedDataParallel) and not last
            with model.no_sync() if silent else nullcontext():  # type: ignore[operator]
                loss = loss_of(model, x_i, wanted_i)
                if plan.penalty:
                    loss = loss + plan.penalty * qsvd.orthogonal_penalty(model)
                (loss / len(pieces)).backward()
        optimizer.step()
        allocator.step(step)
        optimizer.zero_grad()
        states.append(allocator.state_dict())
    return Outcome(states, weights_of(model))


def alone(plan: Plan) -> Outcome:
    """The run in one process, without any group."""
    model = adapted(plan)
    allocator = RankAllocator(model, plan.config)
    return train(plan, model, allocator, optimizer_of(plan, model), range(1, plan.steps + 1))


def ddp(plan: Plan, given: str = "wrapped", options: dict[str, Any] | None = None) -> Outcome:
    """The run of this process under DDP. The allocator is given the wrapped model, or the inner one."""
    torch.manual_seed(dist.get_rank())  # what a process draws by itself must not matter
    inner = adapted(plan)
    if dist.get_rank():
        for layer in qsvd.adapted_layers(inner).values():
            nn.init.normal_(layer.lora_A["default"])  # DDP takes the first process' weights
    model = DistributedDataParallel(inner, **(options or {}))
    allocator = RankAllocator(model if given == "wrapped" else inner, plan.config)
    optimizer = optimizer_of(plan, model)
    steps = range(1, plan.steps + 1)
    return train(plan, model, allocator, optimizer, steps, dist.get_rank(), dist.get_world_size())


def sharded(
    model: nn.Module,
    blocks: bool = True,
    keep_whole: bool = False,
    hybrid: bool = False,
    columns: bool = False,
    **options: Any,
) -> None:
    """`fully_shard` a model over all processes, each of its blocks first, or in one piece.

    keep_whole: the quantised weights are left whole on every process. hybrid: over two of four
    processes, twice. columns: A is split the other way.
    """
    shape = (2, 2) if hybrid else (dist.get_world_size(),)
    names = ("replicate", "shard")[-len(shape) :]
    options["mesh"] = init_device_mesh("cpu", shape, mesh_dim_names=names)
    if keep_whole:
        options["ignored_params"] = {p for p in model.parameters() if not p.is_floating_point()}
    if columns:
        As = {layer.lora_A["default"] for layer in qsvd.adapted_layers(model).values()}
        options["shard_placement_fn"] = lambda p: Shard(int(p in As))
    for block in model.layers if blocks else ():
        fully_shard(block, **options)
    fully_shard(model, **options)


def fsdp2(
    plan: Plan, options: dict[str, Any] | None = None, allocator_first: bool = False
) -> Outcome:
    """The run of this process under FSDP2."""
    model = adapted(plan)
    early = RankAllocator(model, plan.config)
    sharded(model, **(options or {}))
    allocator = early if allocator_first else RankAllocator(model, plan.config)
    optimizer = optimizer_of(plan, model)
    steps = range(1, plan.steps + 1)
    return train(plan, model, allocator, optimizer, steps, dist.get_rank(), dist.get_world_size())

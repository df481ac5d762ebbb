"""A model that several processes train: what wraps it, what a shard of it is, and who shares it.

Under DistributedDataParallel every process holds every parameter, behind a wrapper. `fully_shard` (FSDP2)
wraps nothing: it makes each parameter a DTensor, of which a process holds some rows, except while its
module computes. Elementwise work is done on those rows; `qsvd._gathering` has the rest.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist


@dataclass(frozen=True)
class Peers:
    """The processes that train one adapter together.

    groups: a process group for each dimension of their mesh; none if there is but this process.
    device: where they exchange tensors.
    """

    groups: tuple[Any, ...]
    device: torch.device

    @classmethod
    def of(cls, group: Any, weights: Iterable[Tensor]) -> Peers:
        """Who shares these weights, shards or not.

        Args:
            group: of DistributedDataParallel, if the model is in it: see `group_of`.
            weights: some of the adapter's.
        """
        weights = list(weights)
        device = weights[0].device if weights else torch.device("cpu")
        if group is not None:
            return cls((group,), device)
        for weight in weights:
            if is_shard(weight):
                mesh: Any = weight.device_mesh  # type: ignore[attr-defined]
                return cls(tuple(mesh.get_all_groups()), device)
        return cls((), device)

    def all(self, here: bool) -> bool:
        """Whether something holds on every process."""
        if not self.groups:
            return here
        holds = torch.tensor(int(here), device=self.device)
        for group in self.groups:
            dist.all_reduce(holds, dist.ReduceOp.MIN, group=group)
        return bool(holds)

    def of_first(self, value: Tensor) -> Tensor:
        """The first process' value, on every process; bool or a number, of one shape everywhere."""
        if not self.groups:
            return value
        sent = value.to(self.device, torch.int32 if value.dtype == torch.bool else None)
        for group in self.groups:
            dist.broadcast(sent, dist.get_global_rank(group, 0), group=group)
        return sent.to(value.device, value.dtype)

    def once(self, action: Callable[[], None]) -> None:
        """Let the first process act. Every process returns when it has.

        Raises:
            RuntimeError: on the others, if it failed; on the first, what it raised.
        """
        if not self.groups:
            action()
            return
        failure: Exception | None = None
        if all(dist.get_rank(group) == 0 for group in self.groups):
            try:
                action()
            except Exception as error:
                failure = error
        told = [None if failure is None else f"{type(failure).__name__}: {failure}"]
        for group in self.groups:
            dist.broadcast_object_list(
                told, dist.get_global_rank(group, 0), group=group, device=self.device
            )
        if failure is not None:
            raise failure
        if told[0] is not None:
            raise RuntimeError(f"The first process failed: {told[0]}")


def group_of(model: nn.Module) -> Any:
    """The processes over which DistributedDataParallel averages a model's gradients, or None."""
    wrapped = isinstance(model, nn.parallel.DistributedDataParallel)
    return model.process_group if wrapped else None


def unwrapped(model: nn.Module) -> nn.Module:
    """The model in DistributedDataParallel; any other is itself.

    Raises:
        TypeError: for FSDP1, which has no parameter left that is an adapter's.
    """
    if isinstance(model, _class("torch.distributed.fsdp", "FullyShardedDataParallel")):
        raise TypeError(
            "FullyShardedDataParallel (FSDP1) flattens parameters, and adapters are lost in them: "
            "use `torch.distributed.fsdp.fully_shard` (FSDP2)."
        )
    if isinstance(model, nn.parallel.DistributedDataParallel):
        inner: nn.Module = model.module
        return inner
    return model


def check_not_distributed(model: nn.Module, action: str) -> None:
    """Refuse a model that other processes share already, before it gets new parameters.

    Raises:
        ValueError: they would be averaged with nobody's.
    """
    kind = None
    if unwrapped(model) is not model:
        kind = "wrapped in DistributedDataParallel"
    elif any(True for _ in _sharded_modules(model)):
        kind = "sharded by `fully_shard`"
    if kind is not None:
        raise ValueError(
            f"The model is {kind} already, which does not know of new parameters: {action} first."
        )


def reshard(model: nn.Module) -> None:
    """Register the shards again where an evaluation has left whole parameters, which are copies."""
    for module in _sharded_modules(model):
        module.reshard()


def is_shard(t: Tensor) -> bool:
    """Whether a tensor is a DTensor."""
    return isinstance(t, _class("torch.distributed.tensor", "DTensor"))


def local(t: Tensor) -> Tensor:
    """The rows that this process holds, to be written to; all of a tensor that is no shard."""
    return t.to_local() if is_shard(t) else t  # type: ignore[attr-defined]


def placed(t: Tensor, like: Tensor) -> Tensor:
    """A tensor that every process holds whole, on the device and in the shards of another."""
    if not is_shard(like):
        return t.to(like.device)
    if is_shard(t):
        return t
    from torch.distributed.tensor import distribute_tensor

    mesh, placements = like.device_mesh, like.placements  # type: ignore[attr-defined]
    # Nobody's data is sent: each takes its rows from its own copy.
    return distribute_tensor(t.to(like.device), mesh, placements, src_data_rank=None)


def _sharded_modules(model: nn.Module) -> Iterable[Any]:
    FSDPModule = _class("torch.distributed.fsdp", "FSDPModule")
    return (module for module in model.modules() if isinstance(module, FSDPModule))


def _class(module: str, name: str) -> type[Any] | tuple[()]:
    """A class of torch's; nothing can be an instance of it while its module is not imported."""
    found: type[Any] | tuple[()] = getattr(sys.modules.get(module), name, ())
    return found

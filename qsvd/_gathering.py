"""All rows of tensors that are sharded over processes: many of them in one exchange.

`DTensor.full_tensor` exchanges each by itself, which a model of 200 layers would wait for 600 times.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from qsvd._distributed import is_shard, local

# torch 2.13 renames it, and warns of the old name.
_all_gather: Any = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
_TOGETHER = 2**24  # elements of one exchange: 64 MiB, and as much again for its result


def whole(tensors: Sequence[Tensor]) -> list[Tensor]:
    """All rows of each tensor, on every process; all must ask. With a gradient, its own for each.

    A gradient is taken to be the same on every process, which holds what is computed from whole
    tensors alone.

    Args:
        tensors: shards or not, of one dtype; one that is no shard is returned as it is.
    """
    return gathered([local(t) for t in tensors], like=tensors)


def gathered(rows: Sequence[Tensor], like: Sequence[Tensor]) -> list[Tensor]:
    """What `whole` returns, given the rows of this process.

    Args:
        rows: what this process holds of each tensor, one by one.
        like: tensors that are sharded as these are.
    """
    found = list(rows)
    batches: dict[Any, list[int]] = {}
    for i, t in enumerate(like):
        if not is_shard(t):
            continue
        group = _group_of_rows(t)
        if group is None:
            found[i] = _by_itself(rows[i], t)
        else:
            batches.setdefault(group, []).append(i)
    for group, places in batches.items():
        for some in _limited(places, like):
            lengths = [len(like[i]) for i in some]
            gather: Any = _Gather.apply
            exchanged = gather(group, lengths, *(rows[i] for i in some))
            for i, result in zip(some, exchanged, strict=True):
                found[i] = result
    return found


class _Gather(torch.autograd.Function):
    """The rows of several tensors from every process of a group; backward, this process' rows."""

    @staticmethod
    def forward(ctx: Any, group: Any, lengths: list[int], *rows: Tensor) -> tuple[Tensor, ...]:
        world = dist.get_world_size(group)
        counts = [_rows_by_process(n, world) for n in lengths]
        ctx.counts, ctx.process = counts, dist.get_rank(group)
        widths = [t.shape[1:].numel() for t in rows]
        # The first process holds most of each tensor; the others send zeros after their own.
        size = sum(count[0] * width for count, width in zip(counts, widths, strict=True))
        sent = rows[0].new_zeros(size)
        torch.cat([t.reshape(-1) for t in rows], out=sent[: sum(t.numel() for t in rows)])
        received = sent.new_empty(world * size)
        _all_gather(received, sent, group=group)
        parts: list[list[Tensor]] = [[] for _ in rows]
        for process, data in enumerate(torch.split(received, size) if size else ()):
            start = 0
            for part, t, count, width in zip(parts, rows, counts, widths, strict=True):
                end = start + count[process] * width
                part.append(data[start:end].view(count[process], *t.shape[1:]))
                start = end
        return tuple(
            torch.cat(part) if part else t.new_empty(t.shape)
            for part, t in zip(parts, rows, strict=True)
        )

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        before = [sum(count[: ctx.process]) for count in ctx.counts]
        mine = [
            g[start : start + count[ctx.process]]
            for g, start, count in zip(gradients, before, ctx.counts, strict=True)
        ]
        return None, None, *mine


def _rows_by_process(n: int, world: int) -> list[int]:
    """How many of n rows each process holds: `torch.chunk`'s rule, which DTensor keeps."""
    most = -(-n // world)
    return [max(0, min(most, n - process * most)) for process in range(world)]


def _group_of_rows(t: Any) -> Any:
    """The group over which a shard's rows are split, if that is all that is split; else None."""
    from torch.distributed.tensor import Shard

    split = [i for i, placement in enumerate(t.placements) if not placement.is_replicate()]
    if len(split) != 1:
        return None
    placement = t.placements[split[0]]
    # Exactly: a strided shard, of tensor parallelism, orders its rows otherwise.
    rows = type(placement) is Shard and placement.dim == 0
    return t.device_mesh.get_group(split[0]) if rows else None


def _by_itself(rows: Tensor, like: Any) -> Tensor:
    from torch.distributed.tensor import DTensor

    shard = DTensor.from_local(
        rows, like.device_mesh, like.placements, shape=like.shape, stride=like.stride()
    )
    result: Tensor = shard.full_tensor()
    return result


def _limited(places: Sequence[int], like: Sequence[Tensor]) -> Iterator[list[int]]:
    """The places in order, so many at once as an exchange should hold."""
    some: list[int] = []
    size = 0
    for i in places:
        if some and size + like[i].numel() > _TOGETHER:
            yield some
            some, size = [], 0
        some.append(i)
        size += like[i].numel()
    if some:
        yield some

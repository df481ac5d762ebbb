"""The orthogonal penalty: how far the rows of A and the columns of B are from orthonormal."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from qsvd._gathering import whole
from qsvd._model import layers_with

# Factors that share a node of the graph: enough that the node costs little.
_GROUP = 8


def orthogonal_penalty(model: nn.Module, adapter_name: str = "default") -> Tensor:
    """Mean over all A and B of one adapter of ||A A^T - I||_F, and of ||B^T B - I||_F.

    To be added to the loss, times `config.orth_reg_weight`: PEFT does so in the model's forward, in
    evaluation too; here it is the caller's, so that an evaluation loss is the model's own.
    (PEFT `adalora/model.py`, `AdaLoraModel.forward`. The paper's equation 4 has the norm squared,
    its authors' code has not.)

    Args:
        model: with adapted layers; wrapped or sharded, on every process.
        adapter_name: the adapter whose triplets are meant.

    Returns:
        A scalar, fp32, on the first layer's device.

    Raises:
        ValueError: if the model has no adapted layer, or none with this adapter.
    """
    factors = _factors(model, adapter_name)
    device = factors[0].device
    distances = [_distances(group).to(device) for group in _groups(factors)]
    return torch.cat(distances).mean()


def _factors(model: nn.Module, adapter_name: str) -> list[Tensor]:
    """All A (r, in), and all B transposed, (r, out)."""
    layers = layers_with(model, adapter_name).values()
    factors = whole([p[adapter_name] for m in layers for p in (m.lora_A, m.lora_B)])
    return [f.T if i % 2 else f for i, f in enumerate(factors)]


def _distances(factors: Sequence[Tensor]) -> Tensor:
    """||F F^T - I||_F of each F (r, n), (len(factors),); all have one rank and device."""
    with torch.autocast(factors[0].device.type, enabled=False):
        apply: Any = _Distances.apply
        distances: Tensor = apply(*factors)[0]
        return distances


class _Distances(torch.autograd.Function):
    """||D||_F with D = F F^T - I of several F, and all D, which are not to be differentiated.

    D is symmetric, so that the gradient is 2 D F / ||D||: one product of F's size, where autograd
    makes two of F F^T and adds them.
    """

    @staticmethod
    def forward(*factors: Tensor) -> tuple[Tensor, Tensor]:
        D = _excess(factors)
        return torch.linalg.vector_norm(D, dim=(1, 2)), D

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor]) -> None:
        distances, D = output
        ctx.mark_non_differentiable(D)
        ctx.save_for_backward(distances, D, *inputs)

    @staticmethod
    def backward(ctx: Any, dy: Tensor, _: Tensor) -> tuple[Tensor, ...]:
        distances, D, *factors = ctx.saved_tensors
        with torch.autocast(D.device.type, enabled=False):
            if torch.is_grad_enabled():  # a second derivative: D is a function of F again
                D = _excess(factors)
                distances = torch.linalg.vector_norm(D, dim=(1, 2))
            # Where F is orthonormal D is zero, and so is the gradient.
            scale = 2.0 * dy / distances.clamp(min=torch.finfo(D.dtype).tiny)
            pushes = D * scale[:, None, None]
            return tuple(_pushed(F, push) for F, push in zip(factors, pushes, strict=True))


def _pushed(F: Tensor, push: Tensor) -> Tensor:
    """push @ F, push (r, r) being symmetric, laid out as F (r, n) is: a gradient laid out otherwise
    than its parameter would be copied when it is accumulated."""
    return push @ F if F.is_contiguous() else (F.T @ push).T


def _excess(factors: Sequence[Tensor]) -> Tensor:
    """F F^T - I of each F (r, n): (len(factors), r, r)."""
    gram = torch.stack([F @ F.T for F in factors])
    return gram - torch.eye(gram.shape[1], dtype=gram.dtype, device=gram.device)


def _groups(factors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Consecutive factors of one rank and device, not many: their gradients exist all at once."""
    group: list[Tensor] = []
    for factor in factors:
        if group and (
            len(group) == _GROUP
            or len(factor) != len(group[0])
            or factor.device != group[0].device
            or factor.dtype != group[0].dtype
        ):
            yield group
            group = []
        group.append(factor)
    if group:
        yield group

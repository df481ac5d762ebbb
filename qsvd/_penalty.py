"""The orthogonal penalty: how far the rows of A and the columns of B are from orthonormal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from qsvd._autograd import apply
from qsvd._gathering import whole
from qsvd._model import layers_with


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
    layers = layers_with(model, adapter_name).values()
    factors = whole([p[adapter_name] for m in layers for p in (m.lora_A, m.lora_B)])
    return _mean_distance(factors[::2], factors[1::2])


def _mean_distance(rows: Sequence[Tensor], columns: Sequence[Tensor]) -> Tensor:
    """Mean of ||F F^T - I||_F for F (r, n) in rows, and of ||F^T F - I||_F for F (n, r) in columns."""
    alike: dict[object, list[Tensor]] = {}
    with torch.autocast((*rows, *columns)[0].device.type, enabled=False):
        grams = [apply(_Gram, F, False) for F in rows] + [apply(_Gram, F, True) for F in columns]
    for gram in grams:
        alike.setdefault((gram.shape, gram.dtype, gram.device), []).append(gram)
    distances = [_distances(torch.stack(some)).to(grams[0].device) for some in alike.values()]
    return torch.cat(distances).mean()


def _distances(G: Tensor) -> Tensor:
    """||G_i - I||_F, (m,), for G (m, r, r)."""
    identity = torch.eye(G.shape[1], dtype=G.dtype, device=G.device)
    distances: Tensor = torch.linalg.vector_norm(G - identity, dim=(1, 2))
    return distances


class _Gram(torch.autograd.Function):
    """F F^T for F (r, n), or F^T F of columns, F (n, r): (r, r).

    The gradient is (dG + dG^T) F: one product of F's size, where autograd makes two and adds them.
    """

    @staticmethod
    def forward(F: Tensor, columns: bool) -> Tensor:
        return F.T @ F if columns else F @ F.T

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, bool], output: Tensor) -> None:
        F, ctx.columns = inputs
        ctx.save_for_backward(F)

    @staticmethod
    def backward(ctx: Any, dG: Tensor) -> tuple[Tensor, None]:
        (F,) = ctx.saved_tensors
        push = dG + dG.T
        with torch.autocast(F.device.type, enabled=False):
            dF = F @ push if ctx.columns else push @ F
        return dF, None

"""The orthogonal penalty: how far the rows of A and the columns of B are from orthonormal."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from qsvd._checks import check_known_names
from qsvd._gathering import whole
from qsvd._layer import SVDLayer


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
    terms = [_distance(factor).to(device) for factor in factors]
    return torch.stack(terms).mean()


def _factors(model: nn.Module, adapter_name: str) -> list[Tensor]:
    """All A (r, in), and all B transposed, (r, out)."""
    layers = [m for m in model.modules() if isinstance(m, SVDLayer)]
    known = {name for layer in layers for name in layer.lora_A}
    check_known_names([adapter_name], known)
    mine = [layer for layer in layers if adapter_name in layer.lora_A]
    factors = whole([p[adapter_name] for m in mine for p in (m.lora_A, m.lora_B)])
    return [f.T if i % 2 else f for i, f in enumerate(factors)]


def _distance(factor: Tensor) -> Tensor:
    """||F F^T - I||_F of F (r, n)."""
    with torch.autocast(factor.device.type, enabled=False):
        gram = factor @ factor.T  # r, r
        distance: Tensor = torch.linalg.matrix_norm(gram - torch.eye(len(gram), device=gram.device))
        return distance

"""How large the terms of y and of each gradient are: the operands' norms, and every element's terms."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from conformance.case import ADAPTER_NAMES, as_float64
from conformance.oracle import Adapter
from tests.field.reading import F64, Size


def sizes(
    x: F64,
    adapters: Sequence[Adapter],
    dout: F64,
    base: torch.Tensor,
    base_dx: torch.Tensor | None,
) -> dict[str, Size]:
    """By tensor's name; x (..., in), dout (..., out), and the base layer's y and dx.

    y and dx are sums over the adapters of c L C R, plus what the base layer gave; the gradients of
    A, E and B belong to one adapter each, and are added to nothing.
    """
    rows, grad = (a.reshape(-1, a.shape[-1]) for a in (x, dout))
    given = np.zeros_like(x) if base_dx is None else as_float64(base_dx)
    found = {
        "y": _sum([_chain(a.c, rows, (a.A * a.E).T, a.B.T) for a in adapters], as_float64(base)),
        "dx": _sum([_chain(a.c, grad, a.B, a.A * a.E) for a in adapters], given),
    }
    for name, a in zip(ADAPTER_NAMES, adapters, strict=False):
        found[f"dA {name}"] = _chain(a.c, (a.B * a.E.T).T, grad.T, rows)
        found[f"dB {name}"] = _chain(a.c, grad.T, rows, (a.A * a.E).T)
        found[f"dE {name}"] = _singular(a, rows, grad)
    return found


def _chain(c: float, left: F64, centre: F64, right: F64) -> Size:
    """c L C R, (m, a) (a, b) (b, o)."""
    operands = (left, centre, right)
    return Size(
        elements=abs(c) * (np.abs(left) @ np.abs(centre) @ np.abs(right)),
        one=abs(c) * float(np.prod([_one(m) for m in operands])),
        frobenius=abs(c) * float(np.prod([np.linalg.norm(m) for m in operands])),
        base_one=0.0,
        base_frobenius=0.0,
        inner=centre.shape,
    )


def _singular(a: Adapter, rows: F64, grad: F64) -> Size:
    """dE = c diag(A Xᵀ G B), (r, 1): a chain of four matrices of which the diagonal is kept."""
    operands = (a.A, rows.T, grad, a.B)
    hidden, back = np.abs(rows) @ np.abs(a.A).T, np.abs(grad) @ np.abs(a.B)
    return Size(
        elements=abs(a.c) * (hidden * back).sum(axis=0)[:, None],
        one=abs(a.c) * float(np.prod([_one(m) for m in operands])),
        frobenius=abs(a.c) * float(np.prod([np.linalg.norm(m) for m in operands])),
        base_one=0.0,
        base_frobenius=0.0,
        inner=(a.A.shape[1], len(rows), a.B.shape[0]),
    )


def _sum(parts: Sequence[Size], base: F64) -> Size:
    """The adapters' contributions added to what the base layer gave."""
    flat = base.reshape(-1, base.shape[-1])
    elements = np.abs(base) + sum(p.elements for p in parts).reshape(base.shape)  # type: ignore[union-attr]
    return Size(
        elements=elements,
        one=sum(p.one for p in parts),
        frobenius=sum(p.frobenius for p in parts),
        base_one=_one(flat),
        base_frobenius=float(np.linalg.norm(flat)),
        inner=tuple(n for p in parts for n in p.inner),
    )


def _one(matrix: F64) -> float:
    """The largest sum of magnitudes of a column."""
    return float(np.abs(matrix).sum(axis=0).max(initial=0.0))

"""AdaLoRA's rank allocation: importance of triplets, the budget, who keeps it, and the penalty.

Paper (arXiv 2303.10512), equations 4 and 8 to 12; PEFT `adalora/layer.py` `RankAllocator` and
`adalora/model.py` for the mean over all factors and the norm that is not squared. Where many triplets
are equally important PEFT masks all of them; here the earlier ones are kept, so that the budget is met.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "Averages",
    "budget",
    "most_important",
    "orthogonal_penalty",
    "triplet_importance",
    "update_averages",
]

F = NDArray[np.floating]


class Averages(NamedTuple):
    """Smoothed sensitivity and its uncertainty, of one weight array each."""

    mean: F
    uncertainty: F


def update_averages(
    averages: Averages, weight: F, gradient: F, beta1: float, beta2: float
) -> Averages:
    """One step: I = |w dw|; mean = beta1 mean + (1 - beta1) I; unc likewise of |I - the new mean|."""
    now = np.abs(weight * gradient)
    mean = beta1 * averages.mean + (1 - beta1) * now
    deviation = np.abs(now - mean)
    return Averages(mean, beta2 * averages.uncertainty + (1 - beta2) * deviation)


def triplet_importance(A: Averages, E: Averages, B: Averages) -> F:
    """S_j = s(E_j) + mean_i s(A_ji) + mean_o s(B_oj), with s = mean * uncertainty. (r,)

    Averages of A (r, in), E (r, 1), B (out, r).
    """
    a, e, b = (part.mean * part.uncertainty for part in (A, E, B))
    return np.asarray(e[:, 0] + a.mean(axis=1) + b.mean(axis=0))


def budget(step: int, *, initial: int, final: int, tinit: int, tfinal: int, total_step: int) -> int:
    """Triplets that may be alive at `step`: constant, a cubic fall rounded down, constant."""
    end = total_step - tfinal
    if step <= tinit:
        return initial
    if step >= end:
        return final
    left = 1 - (step - tinit) / (end - tinit)
    return int((initial - final) * left**3 + final)


def most_important(scores: Sequence[F], count: int) -> list[NDArray[np.bool_]]:
    """Masks, one a layer, that keep the `count` largest scores of all; the earlier of equals."""
    together = np.concatenate(scores)
    keep = np.zeros(len(together), dtype=bool)
    keep[np.argsort(-together, kind="stable")[:count]] = True
    return list(np.split(keep, np.cumsum([len(s) for s in scores])[:-1]))


def orthogonal_penalty(factors: Sequence[F]) -> tuple[float, list[F]]:
    """Mean of ||F F^T - I||_F over factors F (r, n), and its gradient in each: A, and B transposed.

    d||G||/dF with G = F F^T - I symmetric: <dG, G> / ||G|| = 2 <dF, G F> / ||G||; zero where G is.
    """
    total, gradients = 0.0, []
    for factor in factors:
        gram = factor @ factor.T - np.eye(len(factor), dtype=factor.dtype)
        norm = np.sqrt((gram * gram).sum())
        total += float(norm)
        slope = np.zeros_like(factor) if norm == 0 else 2 * (gram @ factor) / norm
        gradients.append(slope / len(factors))
    return total / len(factors), gradients

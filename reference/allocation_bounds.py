"""How far float32 may take the allocator's scores, its budget and the penalty from their true values.

Running error analysis, as the true values are computed: each array travels with a bound on the error
of any conforming float32 evaluation of it, in whatever order it adds. With u = 2^-24 and
g(n) = n u / (1 - n u), a weight and its gradient being data:

    now  = |w dw|                     two roundings: the product, and the division by a loss scale >= 1
    mean = b1 mean + (1 - b1) now     at most six of quantities no larger than mean + now: the two decay
                                      rates as float32 (where 1 - b1 is formed from the rounded b1, it is off
                                      by u b1, which is no more of `now`), two products, the difference of an
                                      interpolation mean + (1 - b1) (now - mean), and the sum
    unc  = b2 unc + (1 - b2) |now - mean|          the same, after the rounding of the difference
    s    = mean unc                   one more
    S    = s(E) + mean of s(A) + mean of s(B)      n - 1 roundings for a sum of n, two of a product with
                                      the rounded 1 / n, two sums

Below float32's normal range a rounding loses up to 2^-150 whatever is rounded; where the gradient is divided
before it is multiplied, |w| times that. Measured from the old mean, |now - mean| is 1 / b1 times as far:
every score is larger by one factor, is compared with the same outcome, and is off by no more in proportion.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from reference.allocation import Averages, orthogonal_penalty, triplet_importance, update_averages
from reference.arithmetic import Bounded

__all__ = ["Observed", "bound_importance", "bound_penalty", "budget_range", "observe", "unobserved"]

F = NDArray[np.floating]
_U32 = 2.0**-24
_U64 = 2.0**-53
_TINY = 2.0**-149
_ROUNDINGS_NOW, _ROUNDINGS_AVERAGE = 2, 6


class Observed(NamedTuple):
    """The true averages of one weight array, and the largest errors of a conforming evaluation."""

    averages: Averages
    mean_error: F
    uncertainty_error: F


def unobserved(shape: tuple[int, ...]) -> Observed:
    """Before the first step: exact zeros."""
    zeros = np.zeros(shape)
    return Observed(Averages(zeros, zeros), zeros, zeros)


def observe(before: Observed, weight: F, gradient: F, beta1: float, beta2: float) -> Observed:
    """One step of `update_averages` in float64, with its bounds."""
    after = update_averages(before.averages, weight, gradient, beta1, beta2)
    now = np.abs(weight * gradient)
    now_error = _g(_ROUNDINGS_NOW) * now + (1 + np.abs(weight)) * _TINY
    mean_error = _average_error(
        before.averages.mean, before.mean_error, now, now_error, beta1, _ROUNDINGS_AVERAGE
    )
    deviation = np.abs(now - after.mean)
    propagated = now_error + mean_error
    deviation_error = propagated + _U32 * (deviation + propagated)
    uncertainty_error = _average_error(
        before.averages.uncertainty,
        before.uncertainty_error,
        deviation,
        deviation_error,
        beta2,
        _ROUNDINGS_AVERAGE,
    )
    return Observed(after, mean_error, uncertainty_error)


def bound_importance(A: Observed, E: Observed, B: Observed) -> Bounded:
    """S (r,) of the triplets of one layer, from its A (r, in), E (r, 1), B (out, r)."""
    value = np.asarray(triplet_importance(A.averages, E.averages, B.averages), dtype=np.float64)
    (a, a_error), (e, e_error), (b, b_error) = map(_importance, (A, E, B))
    size = e[:, 0] + _mean(a, 1) + _mean(b, 0)
    propagated = e_error[:, 0] + _mean(a_error, 1) + _mean(b_error, 0)
    roundings = max(a.shape[1], b.shape[0]) + 3
    return Bounded(value, propagated + _g(roundings) * (size + propagated) + _TINY)


def budget_range(
    step: int, *, initial: int, final: int, tinit: int, tfinal: int, total_step: int
) -> tuple[int, int]:
    """The least and the largest budget that a float64 evaluation of the schedule may round down to.

    They differ only where the cubic is within its roundings of an integer: two absolute ones of what
    is left, threefold in its cube, two of the powers, one of each product and sum.
    """
    end = total_step - tfinal
    if step <= tinit:
        return initial, initial
    if step >= end:
        return final, final
    exact = (initial - final) * (1 - Fraction(step - tinit, end - tinit)) ** 3 + final
    slack = Fraction(12 * _U64) * (initial + final)
    return max(final, math.floor(exact - slack)), min(initial, math.floor(exact + slack))


def bound_penalty(factors: Sequence[F]) -> tuple[Bounded, list[Bounded]]:
    """The penalty over factors F (r, n), and its gradient in each of them.

    G = F F^T - I: n roundings of |F| |F|^T and one of the difference. The error of ||G|| is at most the
    norm of G's, and of the roundings of r^2 squares, their sum and a root; squares that underflow are
    far below the error of G's diagonal, which is never less than u. The gradient 2 G F / ||G|| (r products
    each, one sum of its two halves, the division, the mean's own factor) has the norm's relative error
    rho: where the factor is so near to orthonormal that rho is not small, nothing is promised, and the
    bound is infinite. Where G is zero exactly, so is the gradient.
    """
    value, slopes = orthogonal_penalty(factors)
    error, gradients = 0.0, []
    for factor, slope in zip(factors, slopes, strict=True):
        r, n = factor.shape
        gram = factor @ factor.T - np.eye(r)
        size = np.abs(factor) @ np.abs(factor).T + np.eye(r)
        gram_error = _g(n + 1) * size + n * _TINY
        norm = float(np.sqrt((gram * gram).sum()))
        norm_error = float(np.sqrt((gram_error * gram_error).sum()))
        norm_error += _g(r * r + 2) * (norm + norm_error)
        error += norm_error
        slope_error = _slope_error(factor, gram, gram_error, norm, norm_error)
        gradients.append(Bounded(np.asarray(slope, dtype=np.float64), slope_error))
    count = len(factors)
    rounded = (error + _g(count + 1) * (value * count + error)) / count
    bounded = [Bounded(g.value, g.bound / count) for g in gradients]
    return Bounded(np.asarray(value), np.asarray(rounded)), bounded


def _slope_error(
    factor: F, gram: F, gram_error: F, norm: float, norm_error: float
) -> NDArray[np.float64]:
    """The error of 2 G F / ||G||."""
    if norm_error >= 0.5 * norm:
        return np.full(factor.shape, 0.0 if not gram.any() else np.inf)
    rho = norm_error / norm / (1 - norm_error / norm)
    products = (np.abs(gram) + gram_error) @ np.abs(factor)
    absolute = gram_error @ np.abs(factor) + _g(len(factor) + 6) * products
    true = 2 * np.abs(gram @ factor) / norm
    bound = true * rho + 2 * absolute / norm * (1 + rho) + 4 * _TINY
    return np.asarray(bound, dtype=np.float64)


def _importance(observed: Observed) -> tuple[F, F]:
    """mean * uncertainty of one weight array, and its error."""
    mean, uncertainty = observed.averages
    value = mean * uncertainty
    error = (
        mean * observed.uncertainty_error
        + uncertainty * observed.mean_error
        + observed.mean_error * observed.uncertainty_error
    )
    return value, error + _U32 * (value + error) + _TINY


def _average_error(old: F, old_error: F, new: F, new_error: F, beta: float, roundings: int) -> F:
    """The error of beta old + (1 - beta) new."""
    size = old + old_error + new + new_error
    error: F = beta * old_error + (1 - beta) * new_error + _g(roundings) * size + 2 * _TINY
    return error


def _mean(values: F, axis: int) -> F:
    """The mean, and zero over nothing."""
    return np.asarray(values.sum(axis=axis) / max(1, values.shape[axis]))


def _g(n: int) -> float:
    return n * _U32 / (1 - n * _U32)

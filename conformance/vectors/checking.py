"""A port's outputs against their bounds: what each output, vector and clause comes to."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from conformance.clauses import Clause, clauses
from conformance.vectors.index import Output, Vector
from conformance.vectors.loading import Outputs, VectorSet
from conformance.vectors.tensors import FLOATS

__all__ = ["Claim", "ClauseVerdict", "Finding", "VectorVerdict", "Verdict", "judge"]

F64 = NDArray[np.float64]
Claim = Literal["float32", "input"]
Status = Literal["pass", "fail"]


@dataclass(frozen=True)
class Finding:
    """What one output came to. broken: the clauses that it breaks; ratio: its worst error / bound."""

    output: Output
    broken: frozenset[str] = frozenset()
    ratio: float = 0.0
    messages: tuple[str, ...] = ()

    @property
    def asked(self) -> set[str]:
        return {*self.output.clauses, self.output.dtype_clause}


@dataclass(frozen=True)
class VectorVerdict:
    """One vector, all its outputs."""

    vector: Vector
    findings: tuple[Finding, ...]

    @property
    def status(self) -> Status:
        return "fail" if any(f.broken for f in self.findings) else "pass"

    @property
    def worst_ratio(self) -> float:
        return max((f.ratio for f in self.findings), default=0.0)


@dataclass(frozen=True)
class ClauseVerdict:
    """One clause, every output that serves it."""

    clause: Clause
    findings: tuple[Finding, ...]

    @property
    def broken(self) -> tuple[Finding, ...]:
        return tuple(f for f in self.findings if self.clause.id in f.broken)

    @property
    def status(self) -> Status:
        return "fail" if self.broken else "pass"

    @property
    def worst_ratio(self) -> float:
        return max((f.ratio for f in self.findings), default=0.0)


@dataclass(frozen=True)
class Verdict:
    """Everything that was asked. unknown: keys of the port that no vector has, with their files."""

    claim: Claim
    vectors: tuple[VectorVerdict, ...]
    total: int
    unknown: tuple[tuple[str, Path], ...] = field(default=())

    @property
    def clauses(self) -> tuple[ClauseVerdict, ...]:
        """The clauses that were asked, in the order of SPEC.md."""
        findings = [f for v in self.vectors for f in v.findings]
        by_clause = (
            (clause, tuple(f for f in findings if clause.id in f.asked))
            for clause in clauses().values()
        )
        return tuple(ClauseVerdict(clause, asked) for clause, asked in by_clause if asked)

    @property
    def passed(self) -> bool:
        """Something was asked, every MUST clause holds, and no key is left unexplained."""
        must = [c for c in self.clauses if c.clause.level == "MUST"]
        return bool(must) and not self.unknown and all(c.status == "pass" for c in must)


def judge(
    vectors: VectorSet,
    outputs: Outputs,
    claim: Claim = "input",
    kinds: Collection[str] = (),
    dtypes: Collection[str] = (),
) -> Verdict:
    """Compare all outputs of all vectors, or of those of the kinds and dtypes that are named.

    claim: "float32" holds half-precision outputs to an adapter path that computes in float32;
    "input" allows it every rounding to the input's dtype.
    """
    asked = [
        v
        for v in vectors.index.vectors
        if (not kinds or v.kind in kinds) and (not dtypes or v.dtype in (None, *dtypes))
    ]
    known = {o.key for v in vectors.index.vectors for o in v.outputs}
    return Verdict(
        claim=claim,
        vectors=tuple(
            VectorVerdict(v, tuple(_finding(o, vectors, outputs, claim) for o in v.outputs))
            for v in asked
        ),
        total=len(vectors.index.vectors),
        unknown=tuple((key, outputs.files[key]) for key in sorted(outputs.tensors.keys() - known)),
    )


def _finding(output: Output, vectors: VectorSet, outputs: Outputs, claim: Claim) -> Finding:
    """One output: is it there, of the right dtype and shape, and near enough."""
    got = outputs.tensors.get(output.key)
    if got is None:
        places = ", ".join(sorted({str(f) for f in outputs.hashes})) or "the outputs"
        return _all_broken(output, f"{places}: key {output.key!r} is missing.")
    where = f"{outputs.files[output.key]}: {output.key}"
    if got.shape != output.shape:
        return _all_broken(output, f"{where} has shape {got.shape}, expected {output.shape}.")
    broken: set[str] = set()
    messages: list[str] = []
    if got.dtype != output.dtype:
        message = f"{where} has dtype {got.dtype}, expected {output.dtype}."
        if got.dtype not in FLOATS or output.dtype not in FLOATS:
            return _all_broken(output, message)
        # One wrong cast is blamed once: the values are judged beside it.
        broken.add(output.dtype_clause)
        messages.append(message)
    expected = vectors.expected[output.key].values
    bound = np.zeros_like(expected)
    if output.bounds is not None:
        bound = vectors.expected[output.bounds[claim]].values
    ratio, message = _compare(where, got.values, expected, bound)
    if message:
        broken |= set(output.clauses)
        messages.append(message)
    return Finding(output, frozenset(broken), ratio, tuple(messages))


def _all_broken(output: Output, message: str) -> Finding:
    every = frozenset({*output.clauses, output.dtype_clause})
    return Finding(output, every, float("inf"), (message,))


def _compare(where: str, got: F64, expected: F64, bound: F64) -> tuple[float, str]:
    """The worst error / bound, and what is wrong, if anything is.

    `error <= bound` is False for NaN, so a NaN never passes; zeros of either sign are equal.
    """
    if not got.size:
        return 0.0, ""
    with np.errstate(invalid="ignore", over="ignore", divide="ignore"):
        error = np.abs(got - expected)
        bad = ~(error <= bound)
        ratio = np.where(error == 0, 0.0, error / bound)
    ratio = np.nan_to_num(ratio, nan=np.inf, posinf=np.inf)
    if not bad.any():
        return float(ratio.max()), ""
    # Among equally bad elements (NaN, or a bound of zero) the one that is furthest off.
    excess = np.where(bad, ratio, -1.0)
    worst = np.flatnonzero((excess == excess.max()).ravel() & bad.ravel())
    furthest = worst[np.argmax(np.nan_to_num(error.ravel()[worst], nan=np.inf))]
    index = np.unravel_index(furthest, got.shape)
    element = f"[{', '.join(str(int(i)) for i in index)}]" if got.ndim else ""
    limit = float(bound[index])
    allowed = f"bound {limit:.2e}" if limit > 0 else "which must be exact"
    times = float(ratio[index])
    excess_text = f" ({times:.3g} times the bound)" if np.isfinite(times) else ""
    return float(ratio.max()), (
        f"{where}{element} is off by {float(error[index]):.2e}, {allowed}{excess_text}: "
        f"got {float(got[index]):.9g}, expected {float(expected[index]):.9g}; "
        f"{int(bad.sum())} of {bad.size} elements are off."
    )

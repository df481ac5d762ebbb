"""Our rules, in the form of the field's: bounds, the exact lane, and a second rule on top that was proposed.

The whole clause set is no rule for a tensor; `tests.field.clauses` asks it.
"""

from __future__ import annotations

import numpy as np

from tests.field.reading import Reading
from tests.field.rules import HALF, Accepts, Rule

# Below this many elements a tensor's rms error is a matter of luck.
ENOUGH = 64


def within_bounds(r: Reading) -> bool:
    """Every element within the bound for the arithmetic that the port declares."""
    bound = r.expected.strict if r.arithmetic == "float32" else r.expected.permissive
    return bool((r.error <= bound).all())


def within_strict_bounds(r: Reading) -> bool:
    """The same, had the port declared that it computes in fp32, as the mutants in fact do."""
    return bool((r.error <= r.expected.strict).all())


def exact(r: Reading) -> bool:
    """The bits of the exact lane, where it promises any."""
    return r.expected.exact is None or bool((r.got == r.expected.exact).all())


def rms_within(times: float, *, all_pipelines: bool) -> Accepts:
    """The rms error is at most `times` that of one simulated pipeline, or of the worst of twenty."""

    def accepts(r: Reading) -> bool:
        if r.error.size < ENOUGH:
            return True
        noise = r.expected.noise[r.arithmetic][int(all_pipelines)]
        return float(np.sqrt(np.mean(r.error**2))) <= times * noise

    return accepts


def both(*parts: Accepts) -> Accepts:
    return lambda r: all(part(r) for part in parts)


BOUNDS = "ours: bounds"
LANES = "ours: bounds and exact lane"
DECLARED = "ours: bounds and exact lane, had the port declared fp32"

OURS: dict[str, Rule] = {
    rule.name: rule
    for rule in (
        Rule(BOUNDS, within_bounds, "FWD-1, GRAD-1 to GRAD-4: a derived bound for each element"),
        Rule(LANES, both(within_bounds, exact), "and FWD-2, GRAD-5: the bits, on dyadic data"),
        Rule(
            DECLARED,
            both(within_strict_bounds, exact),
            "the mutants declare the wider arithmetic, which is harder to judge; a port that "
            "declares fp32 adapters is held to this",
            for_fp32_adapters=True,
        ),
    )
}
SECOND: dict[str, Rule] = {
    name: Rule(
        name,
        both(within_bounds, exact, rms_within(times, all_pipelines=every)),
        f"and the rms error of tensors with at least {ENOUGH} elements is <= {times:g}x that of "
        + ("the worst of 20 simulated pipelines" if every else "one simulated pipeline"),
        HALF,
    )
    for times, every, name in (
        (2.0, False, "ours and rms <= 2x one pipeline"),
        (3.0, False, "ours and rms <= 3x one pipeline"),
        (2.0, True, "ours and rms <= 2x the worst pipeline"),
        (3.0, True, "ours and rms <= 3x the worst pipeline"),
    )
}

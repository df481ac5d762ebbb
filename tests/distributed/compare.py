"""Whether runs came to the same: bit for bit, or no further apart than the order of a sum accounts for."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cache

import torch
from torch import Tensor

from tests.distributed.runs import Outcome, Plan, alone

AVERAGES = ("means", "uncertainties")


def assert_equal(one: Outcome, two: Outcome) -> None:
    """Every choice, weight and average, bit for bit."""
    _assert_same_choices(one, two)
    for (what, ours), (_, theirs) in zip(_numbers(one), _numbers(two), strict=True):
        assert ours.keys() == theirs.keys(), what
        for name, value in ours.items():
            assert torch.equal(value, theirs[name]), f"{what} of {name}"


def assert_close(outcome: Outcome, plan: Plan, choices: bool = True) -> None:
    """The choices of the run in one process, and its numbers but for the order of their sums.

    See `assert_within_the_spread`.
    """
    one = _alone(plan)
    if choices:
        _assert_same_choices(outcome, one)
    shuffled = [list(_numbers(_alone(replace(plan, seed=seed)))) for seed in range(1, 5)]
    for number, (what, expected) in enumerate(_numbers(one)):
        got = list(_numbers(outcome))[number][1]
        assert_within_the_spread(got, expected, [s[number][1] for s in shuffled], what)


def assert_within_the_spread(
    got: dict[str, Tensor],
    expected: dict[str, Tensor],
    shuffled: Sequence[dict[str, Tensor]],
    what: str = "weights",
) -> None:
    """Numbers of one run are those of another, but for the order of their sums.

    A batch's gradient is a sum over its rows. In one process the rows may come in any order, and each
    order rounds otherwise; a run over several processes is one more order. So it may be as far from
    the run in one process as the furthest of 4 shuffled runs, times 8: the largest of four draws may
    be a lucky one (seen: 3.2 times). Processes that do not talk are 10^7 times as far.

    Distances are relative to the largest number of a tensor, and the spread is over all tensors of a
    kind: in a single one no order may have changed a bit.
    """
    assert got.keys() == expected.keys(), what
    spread = max(max(_distances(s, expected).values(), default=0.0) for s in shuffled)
    for name, off in _distances(got, expected).items():
        assert off <= 8 * spread, f"{what} of {name}: is off by {off:.2g}, orders by {spread:.2g}"


def _distances(got: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, float]:
    """The largest difference in each tensor, relative to its largest number."""
    return {
        name: float((got[name] - value).abs().max() / value.abs().max())
        for name, value in expected.items()
        if value.any() or got[name].any()
    }


def _assert_same_choices(one: Outcome, two: Outcome) -> None:
    for key in ("budget", "rank_pattern"):
        assert [s[key] for s in one.states] == [s[key] for s in two.states]


def _numbers(outcome: Outcome) -> Iterator[tuple[str, dict[str, Tensor]]]:
    yield "weights", outcome.weights
    for step, state in enumerate(outcome.states, start=1):
        yield from ((f"{what} after step {step}", state[what]) for what in AVERAGES)


@cache
def _alone(plan: Plan) -> Outcome:
    return alone(plan)

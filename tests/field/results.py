"""What the measurement found, counted: kills and alarms of each rule, for each dtype of input."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from conformance.case import DTYPES, DType
from tests.field.clauses import Asked
from tests.field.measure import ALL_RULES, Batch, Tally

_GROUPS = ("killed", "sure", "nominal")


@dataclass(frozen=True)
class Score:
    """One rule on one dtype.

    killed: mutants rejected in at least one case. sure: those rejected under every seed.
    nominal: those rejected in at least one case of normal numbers of order one.
    alarms: plays of honest layers that were rejected, out of `plays`, and by which layers.
    """

    killed: tuple[str, ...]
    sure: tuple[str, ...]
    nominal: tuple[str, ...]
    alarms: int
    nominal_alarms: int
    alarmed: tuple[str, ...]


@dataclass(frozen=True)
class Found:
    """One dtype: its mutants, its cases, and every rule's score.

    visible: mutants whose error stands out. equivalent: those that differ from the eager layer in
    some bit, but err no more than honest layers do.
    """

    visible: tuple[str, ...]
    equivalent: tuple[str, ...]
    cases: int
    nominal_cases: int
    plays: int
    nominal_plays: int
    out_of_range: int
    scores: Mapping[str, Score] = field(default_factory=dict)


@dataclass(frozen=True)
class Results:
    """The whole measurement, with what it was made of."""

    settings: Mapping[str, Any]
    found: Mapping[DType, Found]
    clauses: Asked

    def to_json(self) -> dict[str, Any]:
        """Plain data; a score names its mutants by their places in `visible`, which keeps it small."""
        told = asdict(self)
        for found in told["found"].values():
            place = {name: index for index, name in enumerate(found["visible"])}
            for score in found["scores"].values():
                score |= {group: [place[n] for n in score[group]] for group in _GROUPS}
        return told

    @classmethod
    def from_json(cls, given: Mapping[str, Any]) -> Results:
        """Read what `to_json` wrote."""
        return cls(
            given["settings"],
            {dtype: _found(found) for dtype, found in given["found"].items()},
            Asked(**given["clauses"]),
        )


def _found(given: Mapping[str, Any]) -> Found:
    visible = given["visible"]
    scores = {
        name: Score(**_tuples(score | {g: [visible[i] for i in score[g]] for g in _GROUPS}))
        for name, score in given["scores"].items()
    }
    return Found(**{**_tuples(given), "scores": scores})


def _tuples(given: Mapping[str, Any]) -> dict[str, Any]:
    return {name: tuple(v) if isinstance(v, list) else v for name, v in given.items()}


def count(batches: Sequence[Batch]) -> dict[DType, Found]:
    """By dtype, what all layers and seeds found together."""
    found: dict[DType, Found] = {}
    for dtype in DTYPES:
        chosen = [b for b in batches if b.dtype == dtype]
        if chosen:
            found[dtype] = _count(dtype, chosen)
    return found


def _count(dtype: DType, batches: Sequence[Batch]) -> Found:
    names = sorted({name for b in batches for name in b.mutants})
    visible = tuple(n for n in names if any(t.visible for t in _of(n, batches)))
    differing = [n for n in names if any(t.differs for t in _of(n, batches))]
    honest = [t for b in batches for t in b.honest.values()]
    found = Found(
        visible=visible,
        equivalent=tuple(n for n in differing if n not in visible),
        cases=sum(b.scenes for b in batches),
        nominal_cases=sum(max(t.nominal_cases for t in b.honest.values()) for b in batches),
        plays=sum(t.cases for t in honest),
        nominal_plays=sum(t.nominal_cases for t in honest),
        out_of_range=sum(b.out_of_range for b in batches),
    )
    scores = {
        rule.name: _score(index, visible, batches)
        for index, rule in enumerate(ALL_RULES.values())
        if dtype in rule.dtypes
    }
    return Found(**{**found.__dict__, "scores": scores})


def _of(name: str, batches: Iterable[Batch]) -> list[Tally]:
    return [b.mutants[name] for b in batches if name in b.mutants]


def _score(index: int, visible: Sequence[str], batches: Sequence[Batch]) -> Score:
    seeds = sorted({b.number for b in batches})

    def under(name: str, seed: int) -> bool:
        return any(t.rejected[index] for t in _of(name, (b for b in batches if b.number == seed)))

    killed = tuple(n for n in visible if any(under(n, s) for s in seeds))
    tallies = [(name, t) for b in batches for name, t in b.honest.items()]
    return Score(
        killed=killed,
        sure=tuple(n for n in killed if all(under(n, s) for s in seeds)),
        nominal=tuple(n for n in visible if any(t.nominal[index] for t in _of(n, batches))),
        alarms=sum(t.rejected[index] for _, t in tallies),
        nominal_alarms=sum(t.nominal[index] for _, t in tallies),
        alarmed=tuple(sorted({name for name, t in tallies if t.rejected[index]})),
    )

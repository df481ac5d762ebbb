"""How a mutant dies: by which clauses, in which chapters, and under how many of the seeds."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

from conformance.profile import PROFILES, Profile
from conformance.spec import Kind, clauses
from tests.campaigns.searching import Half, HalfTrial, searches
from tests.mutants.asking import kinds, profile_for, verdict
from tests.mutants.gallery import MUTANTS
from tests.mutants.mutant import Mutant, chapter_of

SEEDS = tuple(range(10))
MEASURED = ("quick", "standard")


@dataclass(frozen=True)
class Death:
    """What was found of one mutant.

    killed_by: the claimed clauses that notice, and if none does any others of its chapter.
    rates: per profile, the seeds of `SEEDS` under which its own chapter kills it.
    noticed: the chapters that notice, by probes or under seed 0; its own stands first.
    """

    mutant: str
    killed_by: tuple[str, ...]
    certain: bool  # by probes: under every seed
    quick: int
    standard: int
    noticed: tuple[str, ...]

    def as_entry(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_entry(cls, entry: dict[str, Any]) -> Death:
        lists = {k: tuple(v) for k, v in entry.items() if isinstance(v, list)}
        return cls(**{**entry, **lists})


def death_of(name: str, *, elsewhere: bool = True) -> Death:
    """Ask the mutant's own chapter under all seeds, and every other chapter once if `elsewhere`."""
    mutant = MUTANTS[name]
    claimed = [c for c in mutant.kills if _notices(mutant, c, PROFILES["quick"])]
    own = [c for c in _of(mutant.home, mutant) if c in claimed] or [
        c for c in _of(mutant.home, mutant) if _notices(mutant, c, PROFILES["quick"])
    ]
    rates = {profile: _rate(mutant, own, PROFILES[profile]) for profile in MEASURED}
    others = [c for c in chapters() if c != mutant.home] if elsewhere else []
    noticed = [mutant.home] if rates["standard"] else []
    for chapter in others:
        if any(_notices(mutant, c, PROFILES["quick"]) for c in _of(chapter, mutant)):
            noticed.append(chapter)
    return Death(
        mutant=name,
        killed_by=tuple(dict.fromkeys([*claimed, *own])),
        certain=_by_probes(mutant, own, PROFILES["quick"]),
        quick=rates["quick"],
        standard=rates["standard"],
        noticed=tuple(noticed),
    )


def chapters() -> tuple[str, ...]:
    """The chapters of SPEC.md, by the prefix of their clauses."""
    return tuple(dict.fromkeys(map(chapter_of, clauses())))


def _of(chapter: str, mutant: Mutant) -> list[str]:
    """A chapter's clauses, those first that claim the mutant."""
    all_of_it = [c for c in clauses() if chapter_of(c) == chapter]
    return sorted(all_of_it, key=lambda c: c not in mutant.kills)


def _notices(mutant: Mutant, clause: str, profile: Profile) -> bool:
    """By probes or by the search of seed 0; clauses about real weights are asked as standard does."""
    real = profile_for(clause) if profile_for(clause).real_model else profile
    return any(_kills(mutant, clause, kind, real, "both") for kind in kinds(clause))


def _rate(mutant: Mutant, own: Iterable[str], profile: Profile) -> int:
    """The seeds under which the mutant's own chapter kills it: probes do not depend on the seed."""
    own = list(own)
    if _by_probes(mutant, own, profile):
        return len(SEEDS)
    everything = list(dict.fromkeys([*own, *_of(mutant.home, mutant)]))
    if _by_probes(mutant, everything, profile):
        return len(SEEDS)
    return sum(
        any(
            _kills(mutant, clause, kind, profile, "search", seed)
            for clause, kind in _searching(everything)
        )
        for seed in SEEDS
    )


def _by_probes(mutant: Mutant, own: Iterable[str], profile: Profile) -> bool:
    return any(_kills(mutant, c, kind, profile, "probes") for c in own for kind in kinds(c))


def _searching(own: Iterable[str]) -> Iterator[tuple[str, Kind]]:
    return ((c, kind) for c in own for kind in kinds(c) if searches(c, kind))


def _kills(
    mutant: Mutant, clause: str, kind: Kind, profile: Profile, half: Half, seed: int = 0
) -> bool:
    trial = HalfTrial(port=mutant.port, kind=kind, profile=profile, seed=seed)
    trial.half = half
    return verdict(clause, trial) != ""

"""Profiles: how long the suite looks for a bad case."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Profile:
    """`max_examples` random cases a search, beyond the probes that every profile runs."""

    name: str
    max_examples: int
    real_model: bool


QUICK = Profile("quick", max_examples=8, real_model=False)
STANDARD = Profile("standard", max_examples=40, real_model=True)
SOAK = Profile("soak", max_examples=1000, real_model=True)
PROFILES = {profile.name: profile for profile in (QUICK, STANDARD, SOAK)}

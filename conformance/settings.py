"""What every question of a run has in common: the port, the device, the profile, the seed."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass

import torch

from conformance.case import Case
from conformance.port import Port
from conformance.profile import Profile
from conformance.spec import Kind
from conformance.trial import Trial


@dataclass(frozen=True)
class Settings:
    """One port's part of a run, small enough to be sent to another process.

    `spec` is the port as the command line spelled it; `case` is the JSON of the only case to run;
    `patience` is the number of seconds without a sign of life after which a port counts as hung.
    """

    spec: str
    device: str
    profile: Profile
    seed: int = 0
    case: str | None = None
    patience: float = 120.0

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Settings:
        given = json.loads(text)
        return cls(**{**given, "profile": Profile(**given["profile"])})

    def trial(self, port: Port, kind: Kind) -> Trial:
        """A trial of one layer of the port, with nothing counted yet."""
        return Trial(
            port=port,
            kind=kind,
            device=torch.device(self.device),
            profile=self.profile,
            seed=self.seed,
            only=None if self.case is None else Case.from_json(self.case),
        )

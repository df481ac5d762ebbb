"""The rank budget over a run: constant, then a cubic fall, then constant (paper, equation 12)."""

from __future__ import annotations

from dataclasses import dataclass

from qsvd._config import AdaLoraConfig


@dataclass(frozen=True)
class Schedule:
    """How many triplets may be alive, over all layers together, by optimizer step.

    initial: at the start. final: at the end. warmup: steps before the fall. interval: steps between
    two allocations. settled: the step from which on nothing changes any more.
    """

    initial: int
    final: int
    warmup: int
    interval: int
    settled: int

    @classmethod
    def of(cls, config: AdaLoraConfig, ranks: list[int]) -> Schedule:
        """The schedule of a configuration, for layers of these ranks.

        Layers that were pruned before may hold less than the target: the budget never rises.
        """
        assert config.total_step is not None  # sanity check: the configuration refuses None
        initial = sum(ranks)
        return cls(
            initial=initial,
            final=min(config.target_r * len(ranks), initial),
            warmup=config.tinit,
            interval=config.deltaT,
            settled=config.total_step - config.tfinal,
        )

    def budget(self, step: int) -> int:
        """final + (initial - final) (1 - t)^3, rounded down, t from 0 to 1 between the constants."""
        if step <= self.warmup:
            return self.initial
        if step >= self.settled:
            return self.final
        left = 1 - (step - self.warmup) / (self.settled - self.warmup)
        return int((self.initial - self.final) * left**3 + self.final)

    def allocates(self, step: int) -> bool:
        """Whether the budget is handed out anew at `step`."""
        falling = self.warmup < step < self.settled
        return step == self.settled or (falling and step % self.interval == 0)

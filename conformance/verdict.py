"""What the run found: one outcome per clause, port and layer, and the verdict that follows."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from conformance.margin import Margin
from conformance.spec import KINDS, Clause, Kind, clauses

Status = Literal["pass", "fail", "xfail", "xpass", "skip", "not-provided"]
# Over the two layers the gravest status is the clause's.
_GRAVITY: Sequence[Status] = ("fail", "xpass", "xfail", "pass", "skip", "not-provided")


@dataclass(frozen=True)
class Outcome:
    """One clause asked of one layer of one port.

    `worst_ratio` is the largest observed error / bound, and `margins` how they are distributed;
    `message` says what was wrong, or why the clause was not asked; `reproduce` is the command line
    that shows it again.
    """

    port: str
    clause: str
    kind: Kind
    status: Status
    examples: int = 0
    compared: int = 0
    worst_ratio: float = 0.0
    message: str = ""
    reproduce: str = ""
    margins: tuple[Margin, ...] = ()

    def __post_init__(self) -> None:
        # Other processes send margins as plain data.
        given = (m if isinstance(m, Margin) else Margin(**m) for m in self.margins)
        object.__setattr__(self, "margins", tuple(given))

    def as_properties(self) -> list[tuple[str, object]]:
        """For pytest's `user_properties`: plain data, which reaches other processes."""
        return list(asdict(self).items())

    def for_junit(self) -> list[tuple[str, object]]:
        """What a JUnit file says of the clause: values of a line each.

        The message is the test case's own text there, and nobody reads histograms in XML.
        """
        told = {k: v for k, v in self.as_properties() if k not in ("message", "margins")}
        return [*told.items(), ("level", clauses()[self.clause].level)]

    @classmethod
    def from_properties(cls, properties: Iterable[tuple[str, Any]]) -> Outcome | None:
        """Read back what `as_properties` wrote; None where a report carries no outcome."""
        found = {k: v for k, v in properties if k in cls.__dataclass_fields__}
        return cls(**found) if "clause" in found else None


@dataclass(frozen=True)
class ClauseVerdict:
    """One clause, one port, both layers."""

    clause: Clause
    outcomes: tuple[Outcome, ...]

    @property
    def status(self) -> Status:
        return min((o.status for o in self.outcomes), key=_GRAVITY.index)

    @property
    def worst_ratio(self) -> float:
        return max((o.worst_ratio for o in self.outcomes), default=0.0)

    @property
    def failures(self) -> tuple[Outcome, ...]:
        """What is to be read: failures, known ones too, and unexpected passes."""
        return tuple(o for o in self.outcomes if o.status in ("fail", "xpass", "xfail"))


@dataclass
class PortVerdict:
    """All that was asked of one port."""

    name: str
    version: str
    outcomes: list[Outcome] = field(default_factory=list)

    @property
    def clauses(self) -> tuple[ClauseVerdict, ...]:
        """The clauses that were asked, in the order of SPEC.md."""
        return tuple(
            ClauseVerdict(clause, asked)
            for clause in clauses().values()
            # Sorted: several processes report in an order of their own.
            if (
                asked := tuple(
                    sorted(
                        (o for o in self.outcomes if o.clause == clause.id),
                        key=lambda o: KINDS.index(o.kind),
                    )
                )
            )
        )

    @property
    def ran(self) -> bool:
        """Whether anything was decided: a port that was never asked has not conformed."""
        return any(c.status not in ("skip", "not-provided") for c in self.clauses)

    @property
    def passed(self) -> bool:
        """Every MUST clause that was asked holds, and at least one was decided.

        A known failure is a failure: an xfails file keeps a run green, it does not make a port
        conform.
        """
        return self.ran and not any(
            c.status in ("fail", "xfail", "xpass") and c.clause.level == "MUST"
            for c in self.clauses
        )

    @property
    def green(self) -> bool:
        """Whether the run may exit with 0 as far as this port goes."""
        return self.ran and not any(
            c.status == "xpass" or (c.status == "fail" and c.clause.level == "MUST")
            for c in self.clauses
        )

    def count(self, status: Status, level: str | None = None) -> int:
        return sum(
            c.status == status and (level is None or c.clause.level == level) for c in self.clauses
        )

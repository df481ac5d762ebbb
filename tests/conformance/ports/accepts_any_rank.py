"""A port that breaks a SHOULD clause and no other: it takes 2.5 or "8" for a rank."""

from tests.mutants import honest

__version__ = "1.0"


class _AnyRank:
    def check(self, name: str, r: object, dropout: float) -> None:
        super().check(name, 1, dropout)  # type: ignore[misc]

    def update_layer(self, adapter_name: str, r: object, *rest: object, **more: object) -> None:
        super().update_layer(adapter_name, int(float(str(r))), *rest, **more)  # type: ignore[misc]


class SVDLinear4bit(_AnyRank, honest.SVDLinear4bit):
    """Over 4-bit layers."""

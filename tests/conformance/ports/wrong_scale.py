"""A port with one fault: it scales by alpha / r, as LoRA does."""

from tests.mutants import honest

__version__ = "1.0"


class _AlphaOverRank:
    def scale(self, r: int, alpha: float) -> float:
        return alpha / r if r else 1.0


class SVDLinear4bit(_AlphaOverRank, honest.SVDLinear4bit):
    """Over 4-bit layers."""


class SVDLinear8bitLt(_AlphaOverRank, honest.SVDLinear8bitLt):
    """Over 8-bit layers."""

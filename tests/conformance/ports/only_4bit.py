"""A port that has one of the two layers."""

from tests.mutants.honest import SVDLinear4bit

__all__ = ["SVDLinear4bit"]

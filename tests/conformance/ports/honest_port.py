"""The honest layer, as a port that is loaded from a path."""

from tests.mutants.honest import SVDLinear4bit, SVDLinear8bitLt

__version__ = "1.0"
__all__ = ["SVDLinear4bit", "SVDLinear8bitLt"]

"""A port that never says whether it is merged, and holds the interpreter's lock while it does not."""

import ctypes

from tests.mutants import honest

__version__ = "1.0"


class _Hangs:
    @property
    def merged(self) -> bool:
        # PyDLL: unlike CDLL it keeps the lock, so that no thread of this process gets to run.
        ctypes.PyDLL(None).sleep(3600)
        return False


class SVDLinear4bit(_Hangs, honest.SVDLinear4bit):
    """Over 4-bit layers."""

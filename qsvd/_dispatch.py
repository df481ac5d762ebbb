"""Which layer class a base layer needs: the one place that maps types of base layer to classes."""

from __future__ import annotations

from torch import nn

from qsvd._bitsandbytes import SVDLinear4bit, SVDLinear8bitLt
from qsvd._layer import SVDLayer

_CLASSES: tuple[type[SVDLayer], ...] = (SVDLinear4bit, SVDLinear8bitLt)


def layer_for(base_layer: nn.Module) -> type[SVDLayer]:
    """The class that adapts a base layer: `layer_for(base)(base, "default", r=8)`.

    Args:
        base_layer: a `bitsandbytes.nn.Linear4bit` or `Linear8bitLt`, or a subclass of one.

    Raises:
        TypeError: for any other type, naming it and the supported ones.
    """
    for cls in _CLASSES:
        if isinstance(base_layer, cls.base_type):
            return cls
    supported = ", ".join(f"bitsandbytes.nn.{cls.base_type.__name__}" for cls in _CLASSES)
    kind = f"{type(base_layer).__module__}.{type(base_layer).__name__}"
    raise TypeError(f"Cannot adapt a {kind}. Supported: {supported}.")

"""AdaLoRA adapters over bitsandbytes' quantised linear layers.

    y = base(x) + sum over active adapters a of
        ( dropout_a(x) @ (A_a * E_a).T @ B_a.T ) * scaling_a / (ranknum_a + 1e-5)

`SVDLinear4bit` wraps a `bitsandbytes.nn.Linear4bit`, `SVDLinear8bitLt` a `Linear8bitLt` with int8
weights, and `layer_for` says which of them a given base layer needs.
"""

from qsvd._bitsandbytes import BitsandbytesWarning, SVDLinear4bit, SVDLinear8bitLt
from qsvd._dispatch import layer_for
from qsvd._layer import SVDLayer

__version__ = "0.1.0"

__all__ = [
    "BitsandbytesWarning",
    "SVDLayer",
    "SVDLinear4bit",
    "SVDLinear8bitLt",
    "__version__",
    "layer_for",
]

"""AdaLoRA adapters over bitsandbytes' quantised linear layers.

    y = base(x) + sum over active adapters a of
        ( dropout_a(x) @ (A_a * E_a).T @ B_a.T ) * scaling_a / (ranknum_a + 1e-5)

`SVDLinear4bit` wraps a `bitsandbytes.nn.Linear4bit`, `SVDLinear8bitLt` a `Linear8bitLt` with int8
weights, and `layer_for` says which of them a given base layer needs. `adapt` puts them in place in a whole
model, as an `AdaLoraConfig` says, and `remove` takes them out again.
`RankAllocator` moves the rank budget to where it matters, and `orthogonal_penalty` keeps the triplets
apart. `save_adapter` and `load_adapter` write and read PEFT's files. `packed_for_inference` generates faster
on a CPU.
"""

from qsvd._allocator import RankAllocator
from qsvd._bitsandbytes import BitsandbytesWarning, SVDLinear4bit, SVDLinear8bitLt
from qsvd._checkpoint import load_adapter, save_adapter
from qsvd._config import AdaLoraConfig
from qsvd._dispatch import layer_for
from qsvd._inference import packed_for_inference
from qsvd._layer import SVDLayer
from qsvd._model import adapt, adapted_layers, remove
from qsvd._penalty import orthogonal_penalty

__version__ = "0.1.0"

__all__ = [
    "AdaLoraConfig",
    "BitsandbytesWarning",
    "RankAllocator",
    "SVDLayer",
    "SVDLinear4bit",
    "SVDLinear8bitLt",
    "__version__",
    "adapt",
    "adapted_layers",
    "layer_for",
    "load_adapter",
    "orthogonal_penalty",
    "packed_for_inference",
    "remove",
    "save_adapter",
]

"""PEFT's AdaLoRA models with the arithmetic of these layers, everything else being PEFT's still.

`accelerate` changes the class of PEFT's layers, in place: parameters, hooks, optimizers, PEFT's rank
allocator and `save_pretrained` see the same objects as before.
"""

from __future__ import annotations

from typing import Any, TypeVar

from peft.tuners.adalora.bnb import SVDLinear4bit as PeftLinear4bit
from peft.tuners.adalora.bnb import SVDLinear8bitLt as PeftLinear8bitLt
from torch import Tensor, nn

from qsvd._arithmetic import Adapter, adapted
from qsvd._bitsandbytes import SVDLinear4bit, SVDLinear8bitLt
from qsvd._layer import SVDLayer

M = TypeVar("M", bound=nn.Module)


class _Accelerated:
    """The forward of `qsvd.SVDLayer`, over the state of a PEFT layer."""

    arithmetic: type[SVDLayer]

    def forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """x (..., in) to y (..., out), in the base output's dtype."""
        if self.disable_adapters:
            y: Tensor = self.arithmetic.call_base(self, x, *args, **kwargs)
            return y
        adapters = []
        for name in self.active_adapters:
            if name not in self.lora_A:
                continue  # PEFT's layers may lack an adapter that others have
            # PEFT keeps adapters in half precision if it is told to.
            A, E, B = (p[name].float() for p in (self.lora_A, self.lora_E, self.lora_B))
            ranknum = self.ranknum[name].detach().float()
            dropout, scaling = self.lora_dropout[name], self.scaling[name]
            adapters.append(Adapter(dropout, A, E, B, scaling, ranknum))
        return adapted(
            lambda x: self.arithmetic.call_base(self, x, *args, **kwargs),
            x,
            adapters,
            lambda: self.arithmetic.is_private(self.base_layer),
            drop=lambda dropout, x: (dropout(x), None),  # PEFT's random numbers
        )


class AcceleratedLinear4bit(_Accelerated, PeftLinear4bit):  # type: ignore[misc]
    """PEFT's `SVDLinear4bit` with the forward of `qsvd.SVDLinear4bit`."""

    arithmetic = SVDLinear4bit


class AcceleratedLinear8bitLt(_Accelerated, PeftLinear8bitLt):  # type: ignore[misc]
    """PEFT's `SVDLinear8bitLt` with the forward of `qsvd.SVDLinear8bitLt`."""

    arithmetic = SVDLinear8bitLt


_CLASSES: dict[type[nn.Module], type[nn.Module]] = {
    PeftLinear4bit: AcceleratedLinear4bit,
    PeftLinear8bitLt: AcceleratedLinear8bitLt,
}


def accelerate(model: M) -> M:
    """Let the AdaLoRA layers of a PEFT model compute as qsvd's do: faster, leaner, in the right dtype.

    The output's dtype becomes the base layer's (PEFT's 8-bit layer returns fp32 for half inputs), and
    fp16 neither overflows nor underflows before it is scaled. `restore` undoes it.

    Args:
        model: made by `get_peft_model` or `PeftModel.from_pretrained`.

    Returns:
        The same model.

    Raises:
        ValueError: if it has none of PEFT's two layers.
    """
    found = _of_exact_class(model, _CLASSES)
    if not found and not _of_exact_class(model, {new: old for old, new in _CLASSES.items()}):
        raise ValueError(
            "The model has no AdaLoRA layer of PEFT's over a bitsandbytes layer: nothing to accelerate. "
            "PEFT makes such layers only in a model that says `is_loaded_in_4bit` or "
            "`is_loaded_in_8bit`, as `from_pretrained` with a BitsAndBytesConfig sets it."
        )
    for module in found:
        module.__class__ = _CLASSES[type(module)]
    return model


def restore(model: M) -> M:
    """Give a model's layers PEFT's own forward again.

    Args:
        model: changed by `accelerate`.

    Returns:
        The same model.

    Raises:
        ValueError: if `accelerate` has changed none of them.
    """
    originals = {new: old for old, new in _CLASSES.items()}
    found = _of_exact_class(model, originals)
    if not found:
        raise ValueError("The model is not accelerated: there is nothing to restore.")
    for module in found:
        module.__class__ = originals[type(module)]
    return model


def _of_exact_class(
    model: nn.Module, classes: dict[type[nn.Module], type[nn.Module]]
) -> list[nn.Module]:
    return [module for module in model.modules() if type(module) in classes]

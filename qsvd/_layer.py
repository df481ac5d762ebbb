"""The AdaLoRA layer: active adapters added to one frozen base layer, however it is quantised.

It knows nothing of models, trainers or checkpoint files. What depends on the kind of base layer is
behind four methods, `check_base_layer`, `adopt`, `call_base` and `load_base`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from torch.utils import _python_dispatch, checkpoint

from qsvd._adapters import Adapters
from qsvd._arithmetic import Adapter, adapted, number
from qsvd._autograd import is_eager
from qsvd._checks import AdapterSettings, check_extra_keywords, check_new_name

# What a selective checkpoint (torch 2.4) keeps operations' outputs with, for its second forward pass.
_RECORDERS = tuple(
    getattr(checkpoint, name)
    for name in ("_CachingTorchDispatchMode", "_CachedTorchDispatchMode")
    if hasattr(checkpoint, name)
)
_MERGE_REFUSED = (
    "The base layer's weight is quantised: adding the adapters to it would round them to its grid "
    "and could not be undone. Keep the adapters beside it (`state_dict()` has them), or dequantise "
    "the base layer to a dense one and add `lora_B @ (lora_A * lora_E) * scaling / (ranknum + "
    "1e-5)` to that."
)


class SVDLayer(Adapters):
    """Adapters of the form B @ diag(E) @ A added to a frozen quantised linear layer.

        y = base_layer(x) + sum over active adapters a of
            ( dropout_a(x) @ (A_a * E_a).T @ B_a.T ) * scaling_a / (ranknum_a + 1e-5)

        x (..., in)   A (r, in)   E (r, 1)   B (out, r)   y (..., out)

    Use a subclass: `SVDLinear4bit` or `SVDLinear8bitLt`.

    Args:
        base_layer: the quantised layer; its weight and bias are frozen and otherwise kept as they
            are. One that is not quantised yet may be wrapped, and works once it has been moved.
        adapter_name: the first adapter, which is made active.
        r: its rank, see `update_layer`, as for the following.
        lora_alpha: its scaling, or 0 for r.
        lora_dropout: its dropout's probability.
        init_lora_weights: True: it changes nothing yet.
        **kwargs: what PEFT's model passes to its layers. Descriptions of the base layer
            (`threshold`, `quant_type`, ...) are not used; modes that are lacking here
            (`use_rslora`, `use_dora`, ...) may be False.

    Raises:
        TypeError: for a base layer of another type, an argument of the wrong type, or one that asks
            for a mode that is lacking here; before anything is changed, the random state included.
        ValueError: for an argument out of range, likewise.
    """

    base_type: ClassVar[type[nn.Module]]

    def __init__(
        self,
        base_layer: nn.Module,
        adapter_name: str,
        r: int = 0,
        lora_alpha: float = 1,
        lora_dropout: float = 0.0,
        init_lora_weights: bool = True,
        **kwargs: Any,
    ) -> None:
        check_extra_keywords(kwargs)
        check_new_name(adapter_name, taken=())
        AdapterSettings(r, lora_alpha, lora_dropout, init_lora_weights)
        self.check_base_layer(base_layer)
        super().__init__(self.adopt(base_layer), adapter_name)
        self.update_layer(adapter_name, r, lora_alpha, lora_dropout, init_lora_weights)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The base layer's output plus the active adapters' updates.

        Args:
            x: (..., in_features), at least one dimension; fp32, bf16 or fp16.
            *args: passed on to the base layer.
            **kwargs: passed on to the base layer.

        Returns:
            (..., out_features), in the dtype that the base layer returns, under autocast too.
            Autocast to bf16 rounds an fp32 x of more than 32 rows, and its output's gradient, for
            the adapters' products as it does for the base layer's; their sums are in fp32, and
            added without rounding.

        Raises:
            ValueError: if x's last dimension is not in_features.
            RuntimeError: if the base layer is not quantised yet, or was repacked behind our back.
        """
        if x.dim() == 0 or x.shape[-1] != self.in_features:
            raise ValueError(
                f"x must have shape (..., {self.in_features}), got {tuple(x.shape)}: the base "
                f"layer is {self.in_features} -> {self.out_features}."
            )
        if self._disable_adapters:
            return self.call_base(x, *args, **kwargs)
        # Not by attribute: each would be a call of `Module.__getattr__`, and brackets are slower still.
        parts: dict[str, Any] = self._modules
        lora_A, lora_E, lora_B = parts["lora_A"], parts["lora_E"], parts["lora_B"]
        ranknums, dropouts = parts["ranknum"], parts["lora_dropout"]._modules
        adapters = []
        for name in self._active_adapters:
            A, E, B = getattr(lora_A, name), getattr(lora_E, name), getattr(lora_B, name)
            ranknum = number(getattr(ranknums, name), E.device)
            adapters.append(Adapter(dropouts[name], A, E, B, self.scaling[name], ranknum))
        plain = not (args or kwargs)
        call_base: Callable[[Tensor], Tensor] = (
            self.call_base if plain else lambda x: self.call_base(x, *args, **kwargs)
        )
        return adapted(call_base, x, adapters, lambda: self.is_private(self.base_layer))

    @classmethod
    def is_private(cls, base_layer: nn.Module) -> bool:
        """Whether nobody else sees how the base layer is called, nor what it returns.

        Then its output may be written, and so may the gradient that it returns: bitsandbytes' layers
        have just made either, and read neither again. (PEFT clones the output of a 4-bit layer, for
        fear of a view; a view is not written here.)

        Args:
            base_layer: one that `check_base_layer` accepts.
        """
        return (
            is_eager()
            and type(base_layer) is cls.base_type
            and "forward" not in base_layer.__dict__
            and not _is_hooked(base_layer)
            and not _is_recorded()
        )

    @classmethod
    def check_base_layer(cls, base_layer: nn.Module) -> None:
        """Refuse a base layer that this class cannot wrap, changing nothing.

        Args:
            base_layer: what a constructor was given.

        Raises:
            TypeError: if it is not a `base_type`.
            ValueError: if it is one, in a state that cannot be worked with.
        """
        if isinstance(base_layer, cls.base_type):
            return
        if isinstance(base_layer, SVDLayer):
            raise TypeError(
                f"The base layer is a {type(base_layer).__name__} already: add an adapter to it "
                "with `base_layer.update_layer(name, r)`."
            )
        kind = f"{type(base_layer).__module__}.{type(base_layer).__name__}"
        raise TypeError(
            f"{cls.__name__} wraps a bitsandbytes.nn.{cls.base_type.__name__}, got a {kind}. "
            "`qsvd.layer_for(base_layer)` gives the class for a quantised layer."
        )

    @classmethod
    def adopt(cls, base_layer: nn.Module) -> nn.Module:
        """Freeze the base layer and make it safe to call.

        Args:
            base_layer: one that `check_base_layer` accepts; changed in place.

        Returns:
            The same layer.
        """
        return base_layer.requires_grad_(False)

    def call_base(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The base layer's output. The base layer does not change.

        Args:
            x: (..., in_features).
            *args: passed on to it.
            **kwargs: passed on to it.

        Returns:
            (..., out_features), in the dtype that it returns.

        Raises:
            RuntimeError: if it is not quantised yet, or was repacked behind our back.
        """
        raise NotImplementedError(f"{type(self).__name__} must say how its base layer is called.")

    def load_base(self, state_dict: dict[str, Any], prefix: str, copy: bool) -> None:
        """Put a checkpoint's quantised weight into the base layer.

        Args:
            state_dict: of the whole model; what has been dealt with is taken out of it.
            prefix: of the base layer's keys, with its dot.
            copy: False if the layer may keep the checkpoint's own tensors.

        Raises:
            ValueError: if the weight is not of the base layer's shape.
        """
        raise NotImplementedError(f"{type(self).__name__} must say how its base layer is loaded.")

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        # torch calls this before it loads the children, each from what is left in `state_dict`.
        try:
            copy = not local_metadata.get("assign_to_params_buffers", False)
            self.load_base(state_dict, f"{prefix}base_layer.", copy)
        except ValueError as error:
            error_msgs.append(str(error))
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )

    def merge(self, safe_merge: bool = False, adapter_names: Sequence[str] | None = None) -> None:
        """Refused: the base layer is quantised, and cannot hold the sum. Nothing is changed.

        Args:
            safe_merge: as PEFT has it; not used.
            adapter_names: as PEFT has it; not used.

        Raises:
            NotImplementedError: always, saying what to do instead.
        """
        raise NotImplementedError(f"`merge` is refused. {_MERGE_REFUSED}")

    def unmerge(self) -> None:
        """Refused: nothing was merged. Nothing is changed.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError(f"`unmerge` is refused: nothing was merged. {_MERGE_REFUSED}")

    @property
    def merged(self) -> bool:
        """False: adapters are never merged."""
        return False

    @property
    def merged_adapters(self) -> list[str]:
        """Empty: adapters are never merged."""
        return []

    def get_base_layer(self) -> nn.Module:
        """The quantised layer."""
        return self.base_layer

    @property
    def weight(self) -> Tensor:
        """The base layer's weight: code that looks for `layer.weight` finds it here.

        4-bit: (n, 1), uint8 by default, two codes a byte; 8-bit: (out, in), int8.
        """
        return self.base_layer.weight  # type: ignore[return-value]

    @property
    def bias(self) -> Tensor | None:
        """The base layer's bias, (out,), or None."""
        return self.base_layer.bias  # type: ignore[return-value]


def _is_hooked(module: nn.Module) -> bool:
    """Whether anything is told of the module's inputs, outputs or gradients."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or torch_module._has_any_global_hook()  # type: ignore[no-untyped-call]
    )


def _is_recorded() -> bool:
    """Whether a selective checkpoint keeps what operations return: it forbids to write that."""
    modes = _python_dispatch._get_current_dispatch_mode_stack()
    return any(isinstance(mode, _RECORDERS) for mode in modes)

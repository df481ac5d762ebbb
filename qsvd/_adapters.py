"""The adapters of one layer: their parameters, which of them are active, and which are trained."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from qsvd._checks import AdapterSettings, check_known_names, check_new_name
from qsvd._parameters import Float32Parameters, RankNumbers


class Adapters(nn.Module):
    """Adapters by name, added to the layer `base_layer` by whoever inherits this.

    Attributes:
        lora_A: (r, in) by adapter name, fp32, and fp32 it stays under `.half()` or `.to(dtype)`.
        lora_E: (r, 1), the singular values, likewise.
        lora_B: (out, r), likewise.
        ranknum: (1,) by adapter name: what the update is divided by. It starts at r, is not
            trained, and does not change when singular values are masked.
        scaling: a plain number by adapter name, which may be set.
        r: the rank by adapter name; masked singular values count.
        lora_alpha: as it was given, by adapter name.
        lora_dropout: modules by adapter name.
    """

    def __init__(self, base_layer: nn.Module, adapter_name: str) -> None:
        super().__init__()
        self.training = base_layer.training
        self.base_layer = base_layer
        self.in_features: int = base_layer.in_features  # type: ignore[assignment]
        self.out_features: int = base_layer.out_features  # type: ignore[assignment]
        self.lora_A = Float32Parameters()
        self.lora_E = Float32Parameters()
        self.lora_B = Float32Parameters()
        self.ranknum = RankNumbers()
        self.lora_dropout = nn.ModuleDict()
        self.scaling: dict[str, float] = {}
        self.r: dict[str, int] = {}
        self.lora_alpha: dict[str, float] = {}
        self._active_adapters = [adapter_name]
        self._disable_adapters = False

    def update_layer(
        self,
        adapter_name: str,
        r: int,
        lora_alpha: float = 1,
        lora_dropout: float = 0.0,
        init_lora_weights: bool = True,
    ) -> None:
        """Add an adapter, on the base layer's device. It is not made active: see `set_adapter`.

        Args:
            adapter_name: a new name, without dots.
            r: the rank; 0 is legal and adds nothing to y.
            lora_alpha: the scaling if positive, else the scaling is r. It is not divided by r.
            lora_dropout: probability in [0, 1) of dropping an element of x, for this adapter only.
            init_lora_weights: True for E = 0, A and B ~ N(0, 0.02); False for N(0, 1) throughout.

        Raises:
            TypeError: for an argument of the wrong type; nothing is changed.
            ValueError: for one out of range, or a name that is taken; nothing is changed.
        """
        check_new_name(adapter_name, taken=self.lora_A.keys())
        settings = AdapterSettings(r, lora_alpha, lora_dropout, init_lora_weights)
        device: torch.device = self.base_layer.weight.device  # type: ignore[assignment]
        trained = adapter_name in self._active_adapters and not self._disable_adapters

        def parameter(*shape: int) -> nn.Parameter:
            data = torch.empty(shape, dtype=torch.float32, device=device)
            return nn.Parameter(data, requires_grad=trained)

        self.lora_A[adapter_name] = parameter(settings.r, self.in_features)
        self.lora_E[adapter_name] = parameter(settings.r, 1)
        self.lora_B[adapter_name] = parameter(self.out_features, settings.r)
        # A checkpoint of adapters need not hold ranknum, so nothing would bring it off meta.
        ranknum_device = "cpu" if device.type == "meta" else device
        ranknum = torch.full((1,), float(settings.r), dtype=torch.float32, device=ranknum_device)
        self.ranknum[adapter_name] = nn.Parameter(ranknum, requires_grad=False)
        p = settings.lora_dropout
        self.lora_dropout[adapter_name] = nn.Dropout(p) if p > 0.0 else nn.Identity()
        self.lora_dropout[adapter_name].train(self.training)
        self.r[adapter_name] = settings.r
        self.lora_alpha[adapter_name] = settings.lora_alpha
        self.scaling[adapter_name] = settings.scaling
        if settings.init_lora_weights:
            self.reset_lora_parameters(adapter_name)
        else:
            for parameters in (self.lora_A, self.lora_E, self.lora_B):
                nn.init.normal_(parameters[adapter_name])

    def reset_lora_parameters(self, adapter_name: str) -> None:
        """Start an adapter afresh: E = 0, A and B ~ N(0, 0.02), so that it changes nothing.

        Args:
            adapter_name: one that there is.

        Raises:
            ValueError: for an unknown name.
        """
        check_known_names([adapter_name], self.lora_A.keys())
        nn.init.zeros_(self.lora_E[adapter_name])
        nn.init.normal_(self.lora_A[adapter_name], mean=0.0, std=0.02)
        nn.init.normal_(self.lora_B[adapter_name], mean=0.0, std=0.02)

    def set_adapter(self, adapter_names: str | Sequence[str], inference_mode: bool = False) -> None:
        """Make these adapters active and trainable, and all others neither.

        Args:
            adapter_names: a name or several; none at all leaves y = base(x).
            inference_mode: leave the active adapters frozen.

        Raises:
            ValueError: for an unknown or a repeated name; nothing is changed.
        """
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        check_known_names(names, self.lora_A.keys())
        self._active_adapters = names
        self._train_only([] if inference_mode or self._disable_adapters else names)

    def enable_adapters(self, enabled: bool) -> None:
        """Switch all adapters on or off.

        Args:
            enabled: True: y has the active adapters' updates, and they are trainable. False: y is
                base(x), and all adapters are frozen.
        """
        self._disable_adapters = not enabled
        self._train_only(self._active_adapters if enabled else [])

    def _train_only(self, names: Sequence[str]) -> None:
        for parameters in (self.lora_A, self.lora_E, self.lora_B):
            for name, parameter in parameters.items():
                parameter.requires_grad_(name in names)

    @property
    def active_adapters(self) -> list[str]:
        """The names of the active adapters, in the order in which they are added."""
        return list(self._active_adapters)

    @property
    def active_adapter(self) -> str | list[str]:
        """The active adapter's name, or a list of names if they are not one."""
        names = self.active_adapters
        return names[0] if len(names) == 1 else names

    @property
    def disable_adapters(self) -> bool:
        """Whether all adapters are off; `enable_adapters` changes it."""
        return self._disable_adapters

    def extra_repr(self) -> str:
        lines = [f"{self.in_features} -> {self.out_features}"]
        for name, r in self.r.items():
            off = self._disable_adapters or name not in self._active_adapters
            lines.append(
                f"{name}: r={r}, lora_alpha={self.lora_alpha[name]}, "
                f"dropout={getattr(self.lora_dropout[name], 'p', 0.0)}{' (off)' if off else ''}"
            )
        return "\n".join(lines)

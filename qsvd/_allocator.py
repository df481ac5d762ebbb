"""The rank allocator: at each step the importance of every triplet, and the budget to the best of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from qsvd._checks import check_count
from qsvd._config import AdaLoraConfig
from qsvd._distributed import Peers, group_of, is_shard, local, placed, reshard, unwrapped
from qsvd._gathering import gathered, whole
from qsvd._importance import all_finite, most_important, triplet_importance, update_averages
from qsvd._model import layers_with, note_pattern
from qsvd._schedule import Schedule

_PARTS = ("lora_A", "lora_E", "lora_B")


class RankAllocator:
    """Moves one adapter's rank budget to the layers where it matters (paper, section 3.3, algorithm 1).

        loss.backward()
        optimizer.step()
        allocator.step(global_step)     # before zero_grad: it reads the gradients
        optimizer.zero_grad()

    While the budget falls, every `deltaT` steps the singular values of the least important triplets
    are set to zero; they keep their gradients and may return. At `total_step - tfinal` the choice is
    final, and is applied again after each further step. What is kept is exactly the budget, ties
    decided by order.

    On several processes each has an allocator, and every method is called on all of them. Given the
    model in DistributedDataParallel, or sharded by `fully_shard`, all keep what the first one chose.

    Args:
        model: with the adapter in its layers, see `qsvd.adapt`; wrapped or sharded before or after.
        config: the schedule and the decay rates.
        adapter_name: whose triplets are allocated; adapters of other names are not touched.

    Attributes:
        budget: how many triplets may be alive now, over all layers together.

    Raises:
        ValueError: if no layer of the model has the adapter.
    """

    def __init__(
        self, model: nn.Module, config: AdaLoraConfig, adapter_name: str = "default"
    ) -> None:
        self._group = group_of(model)
        self._model = unwrapped(model)
        self.config = config
        self.adapter_name = adapter_name
        self._layers = layers_with(self._model, adapter_name)
        self.schedule = Schedule.of(config, [m.r[adapter_name] for m in self._layers.values()])
        self.budget = self.schedule.initial
        self._means: dict[str, Tensor] = {}
        self._uncertainties: dict[str, Tensor] = {}
        self._keep: dict[str, Tensor] | None = None

    @torch.no_grad()
    def step(self, global_step: int, grad_scale: float = 1.0) -> int:
        """Take the gradients of this step into account, and mask singular values if it is time.

        A weight without a gradient keeps its averages, and so does every weight if a gradient is
        not finite, on any process: a `GradScaler` skips that optimizer step, too.

        Args:
            global_step: optimizer steps done, from 0 or 1 as PEFT's users count; not micro-batches.
            grad_scale: `scaler.get_scale()` if the gradients are still multiplied by it.

        Returns:
            The budget: how many triplets may be alive now.

        Raises:
            TypeError: for a step that is no integer.
            ValueError: for a negative step, a scale that is not positive, or a step after the choice
                is final if that choice was never made nor loaded.
        """
        step = check_count("global_step", global_step)
        if not 0.0 < grad_scale < float("inf"):
            raise ValueError(f"`grad_scale` must be positive and finite, got {grad_scale}.")
        if step > self.schedule.settled and self._keep is None:
            raise ValueError(
                f"Step {step} is after the last allocation, at {self.schedule.settled}, and no "
                "triplets were chosen: load the allocator's state with `load_state_dict`."
            )
        reshard(self._model)
        self._place()
        if step < self.schedule.settled:
            self._observe(grad_scale)
        self.budget = self.schedule.budget(step)
        if self.schedule.allocates(step):
            self._choose()
            self._mask()
        elif step > self.schedule.settled:
            self._mask()
        if step >= self.schedule.settled:
            self._means.clear()
            self._uncertainties.clear()
        return self.budget

    @property
    def ranks(self) -> dict[str, int]:
        """How many triplets the last allocation left to each layer; all of them before one."""
        if self._keep is None:
            return {name: layer.r[self.adapter_name] for name, layer in self._layers.items()}
        return {name: int(keep.sum()) for name, keep in self._keep.items()}

    @property
    def rank_pattern(self) -> dict[str, list[bool]] | None:
        """Which triplets the last allocation kept, as PEFT's `rank_pattern` has it; None before one."""
        if self._keep is None:
            return None
        return {f"{name}.lora_E": keep.tolist() for name, keep in self._keep.items()}

    def state_dict(self) -> dict[str, Any]:
        """All that a resumed run needs to go on bit for bit, beside the model's own state.

        Returns:
            `means` and `uncertainties`, fp32 copies by weight, on the weights' devices and whole,
            so that any number of processes may go on; `rank_pattern`; `budget`; `adapter_name`.
            `torch.save` writes it, and `torch.load(..., weights_only=True)` reads it.
        """
        averages = [*self._means.values(), *self._uncertainties.values()]
        copies = iter([v.clone() for v in whole(averages)])
        return {
            "adapter_name": self.adapter_name,
            "means": dict(zip(self._means, copies, strict=False)),
            "uncertainties": dict(zip(self._uncertainties, copies, strict=True)),
            "rank_pattern": self.rank_pattern,
            "budget": self.budget,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` returned, onto the devices of the model's weights.

        Args:
            state: of an allocator for the same adapter of the same model; copied.

        Raises:
            ValueError: if it is of another adapter or model, naming the key; nothing is changed.
        """
        expected = {"adapter_name", "means", "uncertainties", "rank_pattern", "budget"}
        if set(state) != expected:
            raise ValueError(
                f"Not an allocator's state: expected {sorted(expected)}, got {sorted(state)}."
            )
        if state["adapter_name"] != self.adapter_name:
            raise ValueError(
                f"The state is of adapter {state['adapter_name']!r}, not of {self.adapter_name!r}."
            )
        reshard(self._model)
        means = self._checked("means", state["means"])
        uncertainties = self._checked("uncertainties", state["uncertainties"])
        if means.keys() != uncertainties.keys():
            raise ValueError("The state's means and uncertainties are of different weights.")
        keep = self._checked_pattern(state["rank_pattern"])
        self.budget = check_count("budget", state["budget"])
        self._means, self._uncertainties, self._keep = means, uncertainties, keep
        if self.rank_pattern is not None:
            note_pattern(self._model, self.adapter_name, self.rank_pattern)

    def _part(self, layer: str, part: str) -> Tensor:
        weight: Tensor = getattr(self._layers[layer], part)[self.adapter_name]
        return weight

    def _weights(self) -> dict[str, Tensor]:
        return {f"{n}.{part}": self._part(n, part) for n in self._layers for part in _PARTS}

    def _place(self) -> None:
        """Shard averages that were loaded before the model was sharded."""
        weights = self._weights()
        for averages in (self._means, self._uncertainties):
            for key, value in averages.items():
                averages[key] = placed(value, weights[key])

    def _observe(self, grad_scale: float) -> None:
        """Move the averages of every weight that has a gradient; of shards, each process its own."""
        weights = {k: w for k, w in self._weights().items() if w.grad is not None}
        gradients = [local(w.grad) for w in weights.values() if w.grad is not None]
        # Averaged gradients are the same everywhere; of shards, one may be finite and another not.
        sharing = Peers.of(None, weights.values())
        if not gradients or not sharing.all(all_finite(gradients)):
            return
        for key, weight in weights.items():
            if key not in self._means:
                self._means[key] = torch.zeros_like(weight)
                self._uncertainties[key] = torch.zeros_like(weight)
        update_averages(
            [local(w) for w in weights.values()],
            gradients,
            [local(self._means[key]) for key in weights],
            [local(self._uncertainties[key]) for key in weights],
            self.config.beta1,
            self.config.beta2,
            grad_scale,
        )

    def _choose(self) -> None:
        scores = self._scores()
        chosen = most_important(scores, self.budget)
        keep = torch.cat([k.cpu() for k in chosen])
        # Every process has computed the same, if its hardware rounds as the others' does.
        keep = Peers.of(self._group, self._weights().values()).of_first(keep)
        parts = torch.split(keep, [len(k) for k in chosen])
        self._keep = {
            n: part.to(s.device) for n, part, s in zip(self._layers, parts, scores, strict=True)
        }
        note_pattern(self._model, self.adapter_name, self.rank_pattern or {})

    def _scores(self) -> list[Tensor]:
        """S (r,) of each layer; zero while none of its weights was observed."""
        weights = self._weights()
        # One by one as they are used: products of all would be as large as an average.
        found: Iterator[Tensor] = (
            self._importance(name, weight) for name, weight in weights.items()
        )
        if any(is_shard(weight) for weight in weights.values()):
            found = iter(gathered(list(found), like=list(weights.values())))
        return [triplet_importance(a, e, b) for a, e, b in zip(found, found, found, strict=True)]

    def _importance(self, name: str, weight: Tensor) -> Tensor:
        """s of each element of a weight that this process holds."""
        if name not in self._means:
            return torch.zeros_like(local(weight))
        return local(self._means[name]) * local(self._uncertainties[name])

    def _mask(self) -> None:
        assert self._keep is not None
        for layer, keep in self._keep.items():
            E = self._part(layer, "lora_E")
            local(E).masked_fill_(local(placed(~keep[:, None], E)), 0.0)

    def _checked(self, what: str, given: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Copies beside the weights that they belong to."""
        weights = self._weights()
        for key, value in given.items():
            if key not in weights:
                raise ValueError(f"The state's {what} have {key!r}, which the model has not.")
            if value.shape != weights[key].shape:
                raise ValueError(
                    f"The state's {what} of {key!r} are {tuple(value.shape)}, the model's weight is "
                    f"{tuple(weights[key].shape)}."
                )
        return {
            k: placed(v.detach().to(torch.float32, copy=True), weights[k]) for k, v in given.items()
        }

    def _checked_pattern(self, given: Mapping[str, list[bool]] | None) -> dict[str, Tensor] | None:
        if given is None:
            return None
        expected = {f"{n}.lora_E": self._layers[n].r[self.adapter_name] for n in self._layers}
        got = {key: len(pattern) for key, pattern in given.items()}
        if got != expected:
            wrong = next(k for k in [*expected, *got] if expected.get(k) != got.get(k))
            raise ValueError(
                f"The state's rank_pattern has {got.get(wrong)} triplets at {wrong!r}, the model "
                f"{expected.get(wrong)}."
            )
        return {n: torch.tensor(given[f"{n}.lora_E"], dtype=torch.bool) for n in self._layers}

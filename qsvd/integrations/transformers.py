"""transformers' Trainer over a model that `qsvd.adapt` has adapted: allocation, logs, checkpoints.

    model = qsvd.adapt(model, config)
    callback = RankAllocatorCallback(model, config)
    Trainer(model, args, train_dataset=..., callbacks=[callback]).train()

Seen in transformers 5.23: the Trainer refuses a quantised model that does not say that it has adapters;
saves a model with `save_pretrained`, which would write the whole base model each time; and reads a
checkpoint with `load_state_dict`. The callback answers the first and the second on the model itself, and
hangs the allocator's state on the third, through torch's own hooks. So resuming, the best model at the
end, and several processes are the Trainer's, as ever.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import SAFE_WEIGHTS_NAME

from qsvd._allocator import RankAllocator
from qsvd._checkpoint import save_adapter
from qsvd._config import AdaLoraConfig
from qsvd._flat import flattened, unflattened
from qsvd._model import adapted_layers
from qsvd._penalty import orthogonal_penalty

# What transformers asks of a quantised model before it trains it, and what it then means by it:
# "there are adapters on it", which is so.
_HAS_ADAPTERS = "_hf_peft_config_loaded"
_PARTS = ("lora_A", "lora_E", "lora_B")


class RankAllocatorCallback(TrainerCallback):  # type: ignore[misc]
    """Steps a `RankAllocator` in transformers' Trainer, and makes the Trainer's checkpoints adapters.

    - After each optimizer step, once however many batches it accumulates, the allocator takes the
      gradients into account, which the Trainer has clipped and freed of fp16's loss scale by then.
    - The orthogonal penalty's gradient, times `orth_reg_weight`, is added before the step, once, after
      the clipping; neither the loss nor `grad_norm` in the logs contains it.
    - Training logs get `budget`, `mean_rank`, `min_rank` and `max_rank`, and `state.log_history` the
      rank of every layer. Reporters to a service that the Trainer made itself run before.
    - `checkpoint-N` gets `adapter_model.safetensors` and `adapter_config.json`, for PEFT and
      `qsvd.load_adapter`, and in `model.safetensors` what resuming needs; the base model is not saved.

    Make it before the Trainer, which refuses a quantised model otherwise. `detach` undoes it.

    Args:
        model: adapted by `qsvd.adapt`; the one that the Trainer is given.
        config: the schedule. Its `total_step` should be the Trainer's number of optimizer steps.
        adapter_name: whose triplets are allocated.

    Raises:
        ValueError: if no layer of the model has the adapter, or the model has a callback already.
    """

    def __init__(
        self, model: nn.Module, config: AdaLoraConfig, adapter_name: str = "default"
    ) -> None:
        if "save_pretrained" in model.__dict__:
            raise ValueError(
                "The model has a callback already: `detach` it, or give the Trainer that one."
            )
        self.allocator = RankAllocator(model, config, adapter_name)
        self.model = model
        self.step = 0
        self._prefix = f"qsvd_allocator.{adapter_name}."
        self._resuming = False
        self._was = model.__dict__.get(_HAS_ADAPTERS)
        object.__setattr__(model, _HAS_ADAPTERS, True)
        object.__setattr__(model, "save_pretrained", self.save)
        self._hooks = (
            model.register_load_state_dict_pre_hook(self._before_load),  # type: ignore[no-untyped-call]
            model.register_load_state_dict_post_hook(self._after_load),  # type: ignore[no-untyped-call]
        )

    def detach(self) -> None:
        """Make the model's `save_pretrained` and `load_state_dict` its own again."""
        for hook in self._hooks:
            hook.remove()
        for name in ("save_pretrained", _HAS_ADAPTERS):
            self.model.__dict__.pop(name, None)
        if self._was is not None:
            object.__setattr__(self.model, _HAS_ADAPTERS, self._was)

    def save(
        self,
        save_directory: str | os.PathLike[str],
        is_main_process: bool = True,
        state_dict: Any = None,
        **options: Any,
    ) -> None:
        """Write the adapter, and in the Trainer's checkpoints what resuming needs.

        The model's `save_pretrained` while the callback is attached. Masked triplets are left out
        once the choice among them is final.

        Args:
            save_directory: made if it is not there.
            is_main_process: False: another process writes.
            state_dict: what the Trainer would write; not used, the adapter is the model's own.
            **options: transformers' others; `safe_serialization` is how all is written.

        Raises:
            TypeError: for options of transformers' method that have no meaning here.
        """
        asked = [key for key, value in options.items() if value and key != "safe_serialization"]
        if asked:
            raise TypeError(f"An adapter's `save_pretrained` does not take `{asked[0]}`.")
        if not is_main_process:
            return
        folder = Path(save_directory)
        final = self.step >= self.allocator.schedule.settled
        save_adapter(self.model, folder, self.allocator.adapter_name, prune=final)
        if folder.name.startswith(PREFIX_CHECKPOINT_DIR):
            save_file(self._training_state(), folder / SAFE_WEIGHTS_NAME, {"format": "pt"})

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Refuse a run that cannot end as the configuration says.

        Raises:
            ValueError: saying what does not fit, and what to do.
        """
        config, settled = self.allocator.config, self.allocator.schedule.settled
        if state.max_steps < settled:
            raise ValueError(
                f"The Trainer will take {state.max_steps} optimizer steps, and the budget falls "
                f"until step {settled}: give the configuration `total_step={state.max_steps}`, or "
                f"the Trainer `max_steps={config.total_step}`."
            )
        if state.global_step != self.step:
            raise ValueError(
                f"The Trainer starts at step {state.global_step}, the allocator is at {self.step}: "
                "make a new model and callback to start again; to resume, the checkpoint must be one "
                "that was saved with this callback."
            )
        if args.deepspeed:
            raise ValueError("DeepSpeed keeps the gradients to itself: use DDP.")
        if args.fsdp:
            raise ValueError(
                "Under FSDP the Trainer saves on one process alone, which holds a shard of the adapter: "
                "use DDP, or FSDP2 in a loop of your own."
            )
        if args.fp16 and not args.max_grad_norm and config.orth_reg_weight:
            raise ValueError(
                "With fp16 and no clipping the gradients are still scaled where the penalty would "
                "be added: set `max_grad_norm`, use bf16, or set `orth_reg_weight=0`."
            )

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Add the penalty's gradient to the weights'; past DDP's hooks, being alike everywhere."""
        if not self.allocator.config.orth_reg_weight:
            return
        weights = [w for n, w in self._weights().items() if w.requires_grad and w.numel()]
        with torch.enable_grad():
            penalty = orthogonal_penalty(self.model, self.allocator.adapter_name)
            loss = self.allocator.config.orth_reg_weight * penalty
            gradients = torch.autograd.grad(loss, weights, allow_unused=True)
        for weight, gradient in zip(weights, gradients, strict=True):
            if gradient is not None:
                weight.grad = gradient if weight.grad is None else weight.grad + gradient

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Allocate: the optimizer has stepped, the gradients are there still."""
        self.step = state.global_step + 1  # the Trainer counts this step a few lines later
        self.allocator.step(self.step)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Add budget and ranks to what is logged of a training step."""
        if not logs or "loss" not in logs:
            return
        ranks = self.allocator.ranks
        numbers = {
            "budget": self.allocator.budget,
            "mean_rank": sum(ranks.values()) / len(ranks),
            "min_rank": min(ranks.values()),
            "max_rank": max(ranks.values()),
        }
        logs.update(numbers)
        state.log_history[-1].update(numbers, ranks=ranks)

    def _weights(self) -> dict[str, nn.Parameter]:
        """The adapter's parameters by their names in the model's `state_dict`."""
        adapter = self.allocator.adapter_name
        return {
            f"{name}.{part}.{adapter}": getattr(layer, part)[adapter]
            for name, layer in adapted_layers(self.model).items()
            if adapter in layer.lora_A
            for part in _PARTS
        }

    def _training_state(self) -> dict[str, Tensor]:
        """Weights with their masked triplets, the allocator's state, and the step."""
        state = {name: w.detach().contiguous() for name, w in self._weights().items()}
        for name, value in flattened(self.allocator.state_dict()).items():
            state[self._prefix + name] = value.contiguous()
        state[f"{self._prefix}step"] = torch.tensor(self.step)
        return state

    def _before_load(
        self, module: nn.Module, state_dict: dict[str, Any], prefix: str, *rest: Any
    ) -> None:
        """Take the allocator's state out of a checkpoint, before the model is loaded from it."""
        mine = f"{prefix}{self._prefix}"
        keys = [key for key in state_dict if key.startswith(mine)]
        found = {key.removeprefix(mine): state_dict.pop(key) for key in keys}
        self._resuming = bool(found)
        if not found:
            return
        lacking = [name for name in self._weights() if prefix + name not in state_dict]
        if lacking:
            raise ValueError(f"The checkpoint has an allocator's state, and lacks {lacking[0]!r}.")
        step = int(found.pop("step"))
        self.allocator.load_state_dict(unflattened(found, self.allocator.adapter_name))
        self.step = step

    def _after_load(self, module: nn.Module, incompatible_keys: Any) -> None:
        """The base model is not in a checkpoint of adapters, and does not lack there."""
        if self._resuming:
            incompatible_keys.missing_keys.clear()

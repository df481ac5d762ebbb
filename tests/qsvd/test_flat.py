"""An allocator's state goes through one flat dictionary of tensors and comes back."""

from __future__ import annotations

import pytest
import torch

from qsvd._flat import flattened, unflattened
from tests.qsvd.test_allocator import adapted, set_gradients


@pytest.mark.parametrize("steps", [0, 2, 5, 18])
def test_a_state_comes_back_whole(steps: int) -> None:
    model, allocator = adapted()
    for step in range(1, steps + 1):
        set_gradients(model, step)
        allocator.step(step)
    state = allocator.state_dict()

    flat = flattened(state)
    back = unflattened(flat, "default")

    assert all(isinstance(value, torch.Tensor) for value in flat.values())
    assert back.keys() == state.keys()
    for what in ("adapter_name", "rank_pattern", "budget"):
        assert back[what] == state[what]
    for what in ("means", "uncertainties"):
        assert back[what].keys() == state[what].keys()
        assert all(torch.equal(back[what][k], state[what][k]) for k in state[what])


def test_what_is_no_state_is_refused() -> None:
    with pytest.raises(ValueError, match="it has 'lora_A'"):
        unflattened({"lora_A": torch.zeros(1)}, "default")
    with pytest.raises(ValueError, match="it has no 'budget'"):
        unflattened({"means/a": torch.zeros(1)}, "default")

"""Processes take GPUs in turns, and leave a GPU that the user named alone."""

from __future__ import annotations

import pytest
import torch

from conformance.devices import device_of_worker, resolve_device, seed_generators


@pytest.mark.parametrize(
    ("device", "worker", "count", "taken"),
    [
        ("cuda", "gw0", 2, "cuda:0"),
        ("cuda", "gw1", 2, "cuda:1"),
        ("cuda", "gw5", 4, "cuda:1"),
        ("cuda", "gw13", 4, "cuda:1"),
        ("cuda", "gw3", 1, "cuda"),
        ("cuda", None, 4, "cuda"),
        ("cuda:2", "gw1", 4, "cuda:2"),
        ("cpu", "gw1", 4, "cpu"),
    ],
)
def test_workers_take_turns(device: str, worker: str | None, count: int, taken: str) -> None:
    assert device_of_worker(torch.device(device), worker, count) == torch.device(taken)


def test_a_device_that_is_not_there_is_refused() -> None:
    with pytest.raises(ValueError, match="--device cuda:77 cannot be used"):
        resolve_device("cuda:77")


def test_seeded_generators_draw_what_they_draw_after_torchs_own_seeding() -> None:
    torch.manual_seed(7)
    expected = torch.rand(5)
    seed_generators(7, torch.device("cpu"))

    assert torch.equal(torch.rand(5), expected)
    assert torch.initial_seed() == 7

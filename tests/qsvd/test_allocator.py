"""The rank allocator against the reference, and where PEFT's goes wrong."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import qsvd
import reference
from qsvd import AdaLoraConfig, RankAllocator
from tests.qsvd.models import WIDTH, stack

PARTS = ("lora_A", "lora_E", "lora_B")


def config(**given: Any) -> AdaLoraConfig:
    defaults: dict[str, Any] = {
        "total_step": 20,
        "tinit": 2,
        "tfinal": 4,
        "init_r": 4,
        "target_r": 2,
        "target_modules": ["q_proj", "v_proj"],
        "init_lora_weights": False,
    }
    return AdaLoraConfig(**{**defaults, **given})


def adapted(**given: Any) -> tuple[nn.Module, RankAllocator]:
    settings = config(**given)
    model = qsvd.adapt(stack(depth=2), settings)
    return model, RankAllocator(model, settings)


def weights(model: nn.Module, adapter: str = "default") -> dict[str, nn.Parameter]:
    return {
        f"{name}.{part}": getattr(layer, part)[adapter]
        for name, layer in qsvd.adapted_layers(model).items()
        for part in PARTS
    }


def set_gradients(model: nn.Module, step: int) -> None:
    """Gradients that any two runs of the same steps share, of many magnitudes."""
    generator = torch.Generator().manual_seed(step)
    for weight in weights(model).values():
        draw = torch.randn(weight.shape, generator=generator)
        weight.grad = draw * torch.randn(weight.shape[0], 1, generator=generator).exp()


class Reference:
    """The reference allocator run beside, in float64, with its bounds."""

    def __init__(self, model: nn.Module, settings: AdaLoraConfig) -> None:
        self.settings = settings
        self.seen = {k: reference.unobserved(tuple(w.shape)) for k, w in weights(model).items()}

    def observe(self, model: nn.Module) -> None:
        for key, weight in weights(model).items():
            assert weight.grad is not None
            self.seen[key] = reference.observe(
                self.seen[key],
                _array(weight),
                _array(weight.grad),
                self.settings.beta1,
                self.settings.beta2,
            )

    def scores(self, model: nn.Module) -> list[reference.Bounded]:
        return [
            reference.bound_importance(*(self.seen[f"{n}.{part}"] for part in PARTS))
            for n in qsvd.adapted_layers(model)
        ]


def within(got: Any, expected: Any, bound: Any) -> bool:
    """Every element is as near as its bound says."""
    return bool((np.abs(got - expected) <= bound).all())


def _array(t: Tensor) -> Any:
    return t.detach().double().numpy()


def test_a_run_follows_the_reference() -> None:
    model, allocator = adapted()
    beside, initial, final = Reference(model, allocator.config), 4 * 4, 4 * 2
    schedule = {"initial": initial, "final": final, "tinit": 2, "tfinal": 4, "total_step": 20}

    for step in range(21):
        set_gradients(model, step)
        if step < 16:
            beside.observe(model)
        budget = allocator.step(step)

        assert budget == reference.budget(step, **schedule)
        if 2 < step <= 16:
            scores = [score.value for score in beside.scores(model)]
            kept = [k.tolist() for k in reference.most_important(scores, budget)]
            assert list((allocator.rank_pattern or {}).values()) == kept
    assert sum(allocator.ranks.values()) == final


def test_averages_and_scores_are_within_the_references_bounds() -> None:
    model, allocator = adapted()
    beside = Reference(model, allocator.config)
    for step in range(8):
        set_gradients(model, step)
        beside.observe(model)
        allocator.step(0)

    state = allocator.state_dict()
    for key, ((mean, uncertainty), mean_error, uncertainty_error) in beside.seen.items():
        assert within(_array(state["means"][key]), mean, mean_error), key
        assert within(_array(state["uncertainties"][key]), uncertainty, uncertainty_error), key
    for got, (score, bound) in zip(allocator._scores(), beside.scores(model), strict=True):
        assert within(_array(got), score, bound)
        assert bound.max() < 1e-4 * score.max()  # sanity check: it says something


def test_it_chooses_as_peft_does_where_peft_is_right() -> None:
    from peft.tuners.adalora.layer import RankAllocator as PeftAllocator

    model, allocator = adapted()
    twin = copy.deepcopy(model)
    theirs = PeftAllocator(twin, _mutable(allocator.config), "default")
    for step in range(1, 16):
        set_gradients(model, step)
        set_gradients(twin, step)
        allocator.step(step)
        _, pattern = theirs.update_and_allocate(twin, step)
        if step > 2:
            assert pattern == {f"{k}.default": v for k, v in (allocator.rank_pattern or {}).items()}
        assert all(
            torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True)
        )


def _mutable(settings: AdaLoraConfig) -> Any:
    from types import SimpleNamespace

    return SimpleNamespace(**settings.to_dict())


def test_between_allocations_singular_values_are_left_alone() -> None:
    model, allocator = adapted(deltaT=5)
    for step in range(1, 17):
        set_gradients(model, step)
        before = allocator.rank_pattern
        allocator.step(step)
        assert (allocator.rank_pattern != before) == (step in (5, 10, 15)) or step == 16


def test_after_the_last_allocation_the_choice_is_applied_at_every_step() -> None:
    model, allocator = adapted()
    for step in range(17):
        set_gradients(model, step)
        allocator.step(step)
    chosen = allocator.rank_pattern
    for step in (17, 18, 50):
        for key, weight in weights(model).items():
            if key.endswith("lora_E"):
                weight.data.fill_(1.0)  # as an optimizer's momentum moves masked values, too
        set_gradients(model, step)
        allocator.step(step)
        assert allocator.rank_pattern == chosen
        alive = sum(
            int(w.count_nonzero()) for k, w in weights(model).items() if k.endswith("lora_E")
        )
        assert alive == 8


def test_equal_ranks_at_start_and_end_mask_nothing() -> None:
    model, allocator = adapted(init_r=3, target_r=3)
    for step in range(21):
        set_gradients(model, step)
        assert allocator.step(step) == 12
    assert set(allocator.ranks.values()) == {3}


def test_ties_favour_earlier_triplets_and_meet_the_budget() -> None:
    model, allocator = adapted()
    for weight in weights(model).values():
        weight.grad = torch.zeros_like(weight)

    assert allocator.step(16) == 8

    assert list(allocator.ranks.values()) == [4, 4, 0, 0]


def test_a_weight_without_a_gradient_keeps_its_averages() -> None:
    model, allocator = adapted()
    set_gradients(model, 0)
    allocator.step(0)
    before = allocator.state_dict()
    set_gradients(model, 1)
    frozen = "layers.0.q_proj.lora_A"
    weights(model)[frozen].grad = None

    allocator.step(1)

    after = allocator.state_dict()
    for key, mean in before["means"].items():
        assert torch.equal(mean, after["means"][key]) == (key == frozen)


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_a_step_that_overflowed_is_not_observed(value: float) -> None:
    model, allocator = adapted()
    set_gradients(model, 0)
    allocator.step(0)
    before = allocator.state_dict()
    set_gradients(model, 1)
    weights(model)["layers.1.v_proj.lora_B"].grad.view(-1)[5] = value  # type: ignore[union-attr]

    allocator.step(1)

    after = allocator.state_dict()
    assert all(torch.equal(before["means"][k], after["means"][k]) for k in before["means"])


def test_the_loss_scale_does_not_enter_the_importance() -> None:
    plain, allocator = adapted()
    scaled, other = adapted()
    for step in range(1, 8):
        set_gradients(plain, step)
        set_gradients(scaled, step)
        scale = 2.0 ** (16 - step)  # exact, and changing as a GradScaler's
        for weight in weights(scaled).values():
            weight.grad *= scale
        allocator.step(step)
        other.step(step, grad_scale=scale)

    assert allocator.rank_pattern == other.rank_pattern
    one, two = allocator.state_dict(), other.state_dict()
    assert all(torch.equal(one["means"][k], two["means"][k]) for k in one["means"])


def test_adapters_whose_names_contain_one_another_are_independent() -> None:
    settings = config()
    model = qsvd.adapt(stack(depth=2), settings, "a")
    for layer in qsvd.adapted_layers(model).values():
        layer.update_layer("ab", 3, init_lora_weights=False)
        layer.set_adapter(["a", "ab"])
    before = {k: w.clone() for k, w in weights(model, "ab").items()}
    allocator = RankAllocator(model, settings, "a")
    for weight in weights(model, "a").values():
        weight.grad = torch.ones_like(weight)

    assert allocator.step(16) == 8

    assert all(torch.equal(w, before[k]) for k, w in weights(model, "ab").items())
    assert allocator.schedule.initial == 4 * 4


def test_a_resumed_run_goes_on_bit_for_bit() -> None:
    model, allocator = adapted()
    resumed = None
    for step in range(1, 21):
        set_gradients(model, step)
        allocator.step(step)
        if resumed is not None:
            twin, other = resumed
            set_gradients(twin, step)
            other.step(step)
            assert other.rank_pattern == allocator.rank_pattern
            assert all(
                torch.equal(a, b)
                for a, b in zip(model.parameters(), twin.parameters(), strict=True)
            )
        if step in (7, 18):
            twin = copy.deepcopy(model)
            resumed = twin, RankAllocator(twin, allocator.config)
            resumed[1].load_state_dict(allocator.state_dict())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("budget"), "Not an allocator's state"),
        (lambda s: s.update(adapter_name="b"), "of adapter 'b', not of 'default'"),
        (lambda s: s["means"].update(x=torch.zeros(1)), "have 'x', which the model has not"),
        (
            lambda s: s["means"].update({"layers.0.q_proj.lora_E": torch.zeros(9, 1)}),
            "are \\(9, 1\\)",
        ),
        (lambda s: s["uncertainties"].pop("layers.0.q_proj.lora_E"), "are of different weights"),
        (
            lambda s: s["rank_pattern"].update({"layers.0.q_proj.lora_E": [True]}),
            "has 1 triplets at",
        ),
        (lambda s: s["rank_pattern"].pop("layers.0.q_proj.lora_E"), "has None triplets at"),
    ],
)
def test_a_state_that_does_not_fit_is_refused_and_changes_nothing(
    change: Any, message: str
) -> None:
    model, allocator = adapted()
    for step in range(1, 6):
        set_gradients(model, step)
        allocator.step(step)
    before, wrong = allocator.state_dict(), allocator.state_dict()
    change(wrong)

    with pytest.raises(ValueError, match=message):
        allocator.load_state_dict(wrong)

    after = allocator.state_dict()
    assert after["rank_pattern"] == before["rank_pattern"]
    assert all(torch.equal(before["means"][k], after["means"][k]) for k in before["means"])


def test_wrong_arguments_are_refused() -> None:
    model, allocator = adapted()
    with pytest.raises(TypeError, match=r"`global_step` must be an integer, got 1\.5"):
        allocator.step(1.5)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="`grad_scale` must be positive and finite, got 0"):
        allocator.step(1, grad_scale=0.0)
    with pytest.raises(ValueError, match="Step 17 is after the last allocation, at 16"):
        allocator.step(17)
    with pytest.raises(ValueError, match=r"No adapter 'b'\. Adapters: \['default'\]"):
        RankAllocator(model, allocator.config, "b")


def test_its_state_is_two_numbers_a_weight() -> None:
    model, allocator = adapted()
    set_gradients(model, 0)
    allocator.step(0)

    held = sum(
        t.numel()
        for what in ("means", "uncertainties")
        for t in allocator.state_dict()[what].values()
    )

    assert held == 2 * sum(w.numel() for w in weights(model).values())


def test_the_penalty_is_the_references() -> None:
    model, _ = adapted()
    penalty = qsvd.orthogonal_penalty(model)
    penalty.backward()

    layers = qsvd.adapted_layers(model).values()
    factors = [f for m in layers for f in (m.lora_A["default"], m.lora_B["default"].T)]
    value, slopes = reference.bound_penalty([_array(f) for f in factors])
    assert within(penalty.item(), *value)
    for layer, dA, dBT in zip(layers, slopes[::2], slopes[1::2], strict=True):
        A, B = layer.lora_A["default"], layer.lora_B["default"]
        assert A.grad is not None
        assert B.grad is not None
        assert within(_array(A.grad), *dA)
        assert within(_array(B.grad).T, *dBT)


def test_a_model_without_the_adapter_is_refused() -> None:
    model, allocator = adapted()
    with pytest.raises(ValueError, match="No adapter 'other'"):
        qsvd.orthogonal_penalty(model, "other")
    for wants_layers in (qsvd.orthogonal_penalty, lambda m: RankAllocator(m, allocator.config)):
        with pytest.raises(ValueError, match=r"no layer of qsvd's: `qsvd\.adapt\(model, config\)`"):
            wants_layers(nn.Linear(2, 2))


def test_training_under_a_falling_budget_learns() -> None:
    torch.manual_seed(1)
    settings = config(total_step=40, tinit=5, tfinal=10, init_lora_weights=True, lora_alpha=16)
    model = qsvd.adapt(stack(depth=2), settings)
    allocator = RankAllocator(model, settings)
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=2e-2)
    x, target = torch.randn(32, WIDTH), torch.randn(32, WIDTH)
    losses = []
    for step in range(1, 41):
        loss = nn.functional.mse_loss(model(x), target)
        (loss + 1e-3 * qsvd.orthogonal_penalty(model)).backward()
        optimizer.step()
        allocator.step(step)
        optimizer.zero_grad()
        losses.append(loss.item())

    assert losses[-1] < 0.8 * losses[0]
    assert sum(allocator.ranks.values()) == 8

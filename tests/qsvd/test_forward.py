"""y = base(x) + the active adapters' updates: its values, its dtype, its shape, and what it leaves alone."""

from __future__ import annotations

import pytest
import torch
from peft import AdaLoraConfig
from peft.tuners.adalora import bnb as peft_layers
from torch import Tensor

from tests.qsvd.build import (
    DTYPES,
    KINDS,
    assert_within,
    base_layer,
    expected,
    layer,
    randomised,
)

pytestmark = pytest.mark.parametrize("kind", KINDS)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_output_is_the_contract_within_its_rounding_errors(kind, dtype):
    adapted = randomised(layer(kind, r=5, lora_alpha=3))
    x, dy = torch.randn(37, 64, dtype=dtype), torch.randn(37, 32, dtype=dtype)
    want = expected(adapted, x, dy)

    assert_within(adapted(x), want.y, want.y_bound)


def test_in_fp32_it_agrees_with_peft(kind):
    base = base_layer(kind)
    peft_class = {"4bit": peft_layers.SVDLinear4bit, "8bit": peft_layers.SVDLinear8bitLt}[kind]
    config = AdaLoraConfig(total_step=10, lora_dropout=0.0)
    theirs = peft_class(base, "default", config, r=5, lora_alpha=3)
    ours = randomised(layer(kind, r=5, lora_alpha=3, base=base))
    x, dy = torch.randn(7, 64), torch.zeros(7, 32)
    want = expected(ours, x, dy)
    adapter = {k: v for k, v in ours.state_dict().items() if not k.startswith("base_layer")}
    missing = theirs.load_state_dict(adapter, strict=False)

    assert not missing.unexpected_keys
    # Both are within the bound of the truth, so within twice the bound of each other.
    assert_within(ours(x), theirs(x).double(), 2 * want.y_bound)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_output_has_the_base_outputs_dtype(kind, dtype):
    adapted = randomised(layer(kind))
    x = torch.randn(3, 64, dtype=dtype)

    assert adapted(x).dtype == adapted.base_layer(x).dtype == dtype


@pytest.mark.parametrize("autocast", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("training", [True, False])
def test_under_autocast_it_returns_what_the_base_layer_returns_there(
    kind, dtype, autocast, training
):
    adapted = randomised(layer(kind)).train(training)
    x = torch.randn(3, 64, dtype=dtype)

    with torch.autocast("cpu", dtype=autocast):
        assert adapted(x).dtype == adapted.base_layer(x).dtype


@torch.no_grad()
def test_autocast_does_not_round_what_is_added_to_an_fp32_output(kind):
    adapted = randomised(layer(kind)).eval()
    x = torch.randn(3, 64)
    plain = adapted(x) - adapted.base_layer(x)

    with torch.autocast("cpu", dtype=torch.bfloat16):
        base = adapted.base_layer(x)
        assert base.dtype == torch.float32
        # The update is the same fp32 number in both. Each time it is rounded once with a base output
        # added, to half an ulp of what is at most the two largest together, and once when that is
        # taken off again, to half an ulp of the update: 4 roundings of 2^-24, and no bf16's 2^-8.
        atol = 4 * 2.0**-24 * float(plain.abs().max() + base.abs().max())
        torch.testing.assert_close(adapted(x) - base, plain, rtol=0, atol=atol)


@pytest.mark.parametrize("shape", [(64,), (3, 64), (2, 3, 64), (2, 2, 3, 64), (2, 1, 2, 3, 64)])
@pytest.mark.parametrize("training", [True, False])
@torch.no_grad()
def test_any_number_of_leading_dimensions_gives_the_flattened_values(kind, shape, training):
    adapted = randomised(layer(kind)).train(training)
    x = torch.randn(shape)
    flat = adapted(x.reshape(-1, 64))
    size = float(flat.abs().max())

    assert adapted(x).shape == (*shape[:-1], 32)
    # Kernels for one and for several rows sum in different orders: 64 + 4 terms of fp32.
    torch.testing.assert_close(adapted(x).reshape(-1, 32), flat, rtol=0, atol=68 * 2**-20 * size)


@pytest.mark.parametrize("shape", [(0, 64), (2, 0, 64), (0, 2, 3, 64)])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("training", [True, False])
def test_an_empty_batch_gives_an_empty_output_and_zero_gradients(kind, shape, dtype, training):
    adapted = randomised(layer(kind)).train(training)
    x = torch.randn(shape, dtype=dtype, requires_grad=True)
    y = adapted(x)
    y.sum().backward()

    assert y.shape == (*shape[:-1], 32)
    assert x.grad.shape == shape
    assert all(
        not p["default"].grad.any() for p in (adapted.lora_A, adapted.lora_E, adapted.lora_B)
    )


def _transposed(x: Tensor) -> Tensor:
    return x.transpose(0, 1).contiguous().transpose(0, 1)


def _strided(x: Tensor) -> Tensor:
    return torch.stack([x, -x], dim=-1).flatten(-2)[..., ::2]


@pytest.mark.parametrize("view", [_transposed, _strided])
def test_a_non_contiguous_input_gives_what_its_copy_gives(kind, view):
    adapted = randomised(layer(kind))
    x = torch.randn(3, 5, 64)

    assert not view(x).is_contiguous()
    torch.testing.assert_close(adapted(view(x)), adapted(x))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_a_poisoned_row_reaches_no_other_row(kind, dtype, poison):
    adapted = randomised(layer(kind))
    x = torch.randn(5, 64, dtype=dtype)
    clean = adapted(x)
    x[2, 3] = poison
    keep = [0, 1, 3, 4]

    assert torch.equal(adapted(x)[keep], clean[keep])
    assert not adapted(x)[2].isfinite().all()


@pytest.mark.parametrize("rows", [2, 40])
def test_a_finite_fp16_result_stays_finite(kind, rows):
    """
    x @ A.T is 65536 and the update before the division by ranknum 2^17: both leave fp16's range.
    """
    base = base_layer(kind, bias=False)
    adapted = layer(kind, r=8, lora_alpha=1, base=base)
    with torch.no_grad():
        for p in (adapted.lora_A, adapted.lora_E, adapted.lora_B):
            p["default"].zero_()
        adapted.lora_A["default"][0] = 1024.0
        adapted.lora_E["default"][0] = 1.0
        adapted.lora_B["default"][:, 0] = 2.0
    x = torch.ones(rows, 64, dtype=torch.float16)
    update = adapted(x).double() - base(x).double()

    # Rounded twice (y and base) at 2^14 < |y| < 2^15, where fp16's numbers are 16 apart.
    torch.testing.assert_close(update, torch.full_like(update, 2**17 / (8 + 1e-5)), rtol=0, atol=16)


@pytest.mark.parametrize("rows", [2, 40])
def test_a_finite_fp16_result_stays_finite_where_the_hidden_vector_does_not(kind, rows):
    """
    x @ (A * E * c).T is 2^19, outside fp16's range; B brings the update back to 2^10.
    """
    base = base_layer(kind, bias=False)
    adapted = layer(kind, r=8, lora_alpha=1, base=base)
    with torch.no_grad():
        adapted.lora_A["default"].zero_()[0] = 1024.0
        adapted.lora_E["default"][0] = 64.0
        adapted.lora_B["default"].fill_(2.0**-9)
    x = torch.ones(rows, 64, dtype=torch.float16)
    update = adapted(x).double() - base(x).double()

    # Rounded twice near 2^10, where fp16's numbers are at most 1 apart.
    want = torch.full_like(update, 2**13 / (8 + 1e-5))
    torch.testing.assert_close(update, want, rtol=0, atol=1)


def test_two_adapters_add_up_and_both_see_x_as_it_was_given(kind):
    adapted = layer(kind, r=3, lora_alpha=3)
    adapted.update_layer("other", 5, lora_alpha=7)
    randomised(adapted)
    x, dy = torch.randn(6, 64, dtype=torch.bfloat16), torch.zeros(6, 32, dtype=torch.bfloat16)
    one, two = expected(adapted, x, dy), expected(adapted, x, dy, "other")
    base = adapted.base_layer(x).double()
    adapted.set_adapter(["default", "other"])

    # Between the two additions the sum may be rounded once more, to bf16.
    bound = one.y_bound + two.y_bound + 2.0**-8 * one.y.abs()
    assert_within(adapted(x), one.y + two.y - base, bound)
    bound = one.y_bound + two.y_bound + 2.0**-8 * two.y.abs()
    adapted.set_adapter(["other", "default"])
    assert_within(adapted(x), one.y + two.y - base, bound)


@pytest.mark.parametrize("shape", [(1, 64), (2, 3, 64)])
@pytest.mark.parametrize("training", [True, False])
def test_the_sum_of_few_rows_is_in_fp32_and_rounded_once(kind, shape, training):
    adapted = layer(kind, r=3, lora_alpha=3)
    adapted.update_layer("other", 5, lora_alpha=7)
    randomised(adapted).set_adapter(["default", "other"])
    x = torch.randn(shape, dtype=torch.bfloat16)
    want = adapted.base_layer(x).detach().double()
    size = want.abs()
    for name in ("default", "other"):
        A, E, B = (
            p[name].detach().double() for p in (adapted.lora_A, adapted.lora_E, adapted.lora_B)
        )
        c = adapted.scaling[name] / (adapted.r[name] + 1e-5)
        want = want + c * x.double() @ (A * E).T @ B.T
        size = size + c * x.double().abs() @ (A * E).abs().T @ B.abs().T

    with torch.set_grad_enabled(training):
        found = adapted(x)
    # 64 and 5 terms, two sums and 7 roundoffs of factors in fp32.
    bound = 2.0**-8 * want.abs() + 1.02 * (64 + 5 + 2 + 7) * 2.0**-24 * size
    assert_within(found, want, bound)


@pytest.mark.parametrize("args", [(), (2.0,)])
@pytest.mark.parametrize("kwargs", [{}, {"shift": 3.0}])
def test_further_arguments_reach_the_base_layer(kind, args, kwargs):
    adapted = layer(kind)  # that changes nothing
    x = torch.randn(3, 64)
    base, y = adapted.base_layer, adapted(x)
    forward = base.forward
    base.forward = lambda x, times=1.0, *, shift=0.0: times * forward(x) + shift

    want = (args or (1.0,))[0] * y + kwargs.get("shift", 0.0)
    assert torch.equal(adapted(x, *args, **kwargs), want)


@pytest.mark.parametrize("shape", [(63,), (3, 65), ()])
def test_an_input_of_the_wrong_width_is_refused_before_the_base_layer_runs(kind, shape):
    adapted = layer(kind)
    adapted.base_layer.register_forward_hook(lambda *_: pytest.fail("the base layer ran"))

    with pytest.raises(ValueError, match=r"x must have shape \(\.\.\., 64\)"):
        adapted(torch.ones(shape))


def test_dropout_is_for_the_adapter_alone_and_for_training_alone(kind):
    adapted = randomised(layer(kind, lora_dropout=0.5))
    x = torch.randn(4, 64)
    seen: list[Tensor] = []
    adapted.base_layer.register_forward_pre_hook(lambda _, args: seen.append(args[0]))

    assert not torch.equal(adapted(x), adapted(x))
    assert all(torch.equal(s, x) for s in seen)
    adapted.eval()
    assert torch.equal(adapted(x), adapted(x))


def test_one_adapters_dropout_does_not_reach_the_next(kind):
    adapted = layer(kind, lora_dropout=0.9)
    adapted.update_layer("other", 5, lora_alpha=7, init_lora_weights=False)
    adapted.set_adapter(["default", "other"])
    x, dy = torch.randn(6, 64), torch.zeros(6, 32)
    want = expected(adapted, x, dy, "other")

    assert_within(adapted(x), want.y, want.y_bound)  # E = 0 in the adapter that drops


@torch.no_grad()
def test_the_scale_is_read_at_every_forward(kind):
    adapted = randomised(layer(kind, r=4))
    x = torch.randn(3, 64)
    base, once = adapted.base_layer(x), adapted(x)
    adapted.scaling["default"] *= 2
    twice = adapted(x)
    adapted.ranknum["default"].mul_(2).add_(1e-5)

    size = 8 * 2.0**-24 * float(twice.abs().max() + base.abs().max())  # eight roundings of y's size
    torch.testing.assert_close(twice - base, 2 * (once - base), rtol=0, atol=2 * size)
    torch.testing.assert_close(adapted(x), once, rtol=0, atol=size)

"""The products behind the arithmetic, and the way they take on CUDA, with its one kernel emulated."""

from __future__ import annotations

import pytest
import torch

import qsvd._products as products
from tests.qsvd.build import U32, UNIT_ROUNDOFF, assert_within, expected, layer, randomised

HALVES = (torch.bfloat16, torch.float16)


@pytest.fixture
def cuda_way(monkeypatch):
    """The code path of CUDA tensors on the CPU: `mm(half, half, out_dtype=float32)` is emulated."""

    def mm(a, b):
        assert a.dtype == b.dtype
        assert a.dtype in HALVES
        return a.float() @ b.float()

    monkeypatch.setattr(products, "_on_cuda", lambda t: True)
    monkeypatch.setattr(products, "_mm_half_into_fp32", mm)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("scale", [1e-30, 1e-6, 1.0, 1e6, 1e30])
def test_on_cuda_the_skinny_factor_is_rounded_and_nothing_else(cuda_way, dtype, scale):
    S = torch.randn(3, 50) * scale * torch.tensor([[1.0], [1e-4], [1e6]])
    data = torch.randn(50, 20).to(dtype)
    want = S.double() @ data.double()
    # In fp16 a row is scaled to a largest element of 2^12 at the least, subnormals end at 2^-25.
    lost = UNIT_ROUNDOFF[dtype] * S.abs() + 2.0**-37 * S.abs().amax(dim=1, keepdim=True)
    bound = (lost + 53 * U32 * S.abs()).double() @ data.double().abs()

    found = products.times(S, data)
    assert found.dtype == torch.float32
    assert_within(found, want, bound)


@pytest.mark.parametrize("dtype", HALVES)
def test_a_product_of_nothing_is_zero(cuda_way, dtype):
    found = products.times(torch.ones(3, 0), torch.ones(0, 5, dtype=dtype))

    assert torch.equal(found, torch.zeros(3, 5))


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize("rows", [0, 1, 37])
def test_on_cuda_the_layer_is_within_the_same_bounds(cuda_way, dtype, rows):
    adapted = randomised(layer("4bit", r=5, lora_alpha=3))
    x, dy = torch.randn(rows, 64).to(dtype), torch.randn(rows, 32).to(dtype)
    want = expected(adapted, x, dy, half=dtype in HALVES)
    leaf = x.clone().requires_grad_(True)
    y = adapted(leaf)
    y.backward(dy)

    assert_within(y, want.y, want.y_bound)
    assert_within(leaf.grad, want.dx, want.dx_bound)
    for name, (value, bound) in want.gradients.items():
        assert_within(getattr(adapted, name)["default"].grad, value, bound)


@pytest.mark.parametrize("way", ["cpu", "cuda"])
def test_fp16_factors_out_of_range_give_a_result_in_range(way, request):
    """
    Terms far above 65504 meet columns where R is tiny, or cancel: the results are finite.
    """
    if way == "cuda":
        request.getfixturevalue("cuda_way")
    S = torch.tensor([[2.0**20, -(2.0**-8)], [2.0**20, 0.0]])  # rank, n
    R = torch.tensor([[1.0, 2.0**-12, 1.0], [0.0, 0.0, -1.0]])  # rank, k
    onto = torch.tensor([[0.0, 1.0, 3.0], [0.0, 1.0, 3.0]], dtype=torch.float16)
    found = products.expand(S, R, torch.float16, onto=onto)
    want = torch.tensor([[float("inf"), 257.0, 3.0], [-(2.0**-8), 1.0, 3.0 - 2.0**-8]])

    assert torch.equal(found, want.half())


@pytest.mark.parametrize("way", ["cpu", "cuda"])
def test_fp16_rows_do_not_disturb_each_other(way, request):
    if way == "cuda":
        request.getfixturevalue("cuda_way")
    S, R = torch.randn(3, 5), torch.randn(3, 7)
    alone = products.expand(S, R, torch.float16)
    S[1, 2] = float("nan")
    S[0, 3] = 2.0**40
    found = products.expand(S, R, torch.float16)

    assert torch.equal(found[[0, 1, 4]], alone[[0, 1, 4]])
    assert found[2].isnan().all()


@pytest.mark.parametrize("scale", [2.0**-20, 2.0**-10, 1.0, 2.0**10])
def test_fp16_expansion_is_accurate_at_every_split_of_the_scale(cuda_way, scale):
    S, R = torch.randn(3, 5) * scale, torch.randn(3, 7) / scale
    want = S.T.double() @ R.double()
    u = UNIT_ROUNDOFF[torch.float16]
    bound = 2.1 * u * (S.T.abs() @ R.abs()).double() + u * want.abs() + 4 * 2.0**-25

    assert_within(products.expand(S, R, torch.float16), want, bound)


def test_fp16_expansion_is_exact_where_factors_and_sums_fit(cuda_way):
    """
    At either end of what one set of ranks holds, and where two terms of 2^20 cancel.
    """
    S = torch.tensor([[0.5 + 2.0**-11, 2.0**15, 2.0**20], [0.0, 0.0, -(2.0**20)]])  # rank, n
    R = torch.ones(2, 1)  # rank, k
    want = torch.tensor([[0.5 + 2.0**-11], [2.0**15], [0.0]])

    assert torch.equal(products.expand(S, R, torch.float16), want.half())


def test_fp16_expansion_of_a_row_at_the_end_of_fp32_is_exact(cuda_way):
    """2^-127 is no normal fp32 number, and R times 2^-125 would overflow in the second set of ranks."""
    S, R = torch.tensor([[2.0**-126]]), torch.tensor([[1.5 * 2.0**126]])

    assert products.expand(S, R, torch.float16).tolist() == [[1.5]]


@pytest.mark.parametrize("n", [0, 1, 2, 3, 8])
def test_steps_cover_every_row_once(monkeypatch, n):
    monkeypatch.setattr(products, "_BLOCK_ELEMENTS", 12)
    x, y = torch.randn(n, 4).half(), torch.randn(n, 6).half()
    steps = list(products.steps(x, y))
    blocks = [products.widened(x[at]) for at in steps]

    assert torch.equal(torch.cat(blocks), x.float())
    assert all(len(block) <= 2 for block in blocks)


@pytest.mark.parametrize(
    ("dtypes", "whole"),
    [
        ((torch.bfloat16, torch.bfloat16), True),
        ((torch.float32,), True),
        ((torch.float32, torch.float32), False),
        ((torch.bfloat16, torch.float32), False),
        ((torch.float16,), False),
    ],
)
def test_what_is_multiplied_as_it_is_comes_in_one_step_unless_a_cache_helps(dtypes, whole):
    data = [torch.randn(2**10, 2**9).to(dtype) for dtype in dtypes]
    steps = list(products.steps(*data))

    assert (len(steps) == 1) == whole
    assert products.widened(data[0]).dtype == (
        torch.float32 if dtypes[0] == torch.float16 else dtypes[0]
    )


@pytest.mark.parametrize("width", [0, 1, 12, 13, 1000])
def test_rows_of_any_width_come_in_blocks_of_one_at_least(monkeypatch, width):
    monkeypatch.setattr(products, "_BLOCK_ELEMENTS", 12)
    blocks = list(products._steps(3, width))

    assert sum(len(range(3)[block]) for block in blocks) == 3
    assert all(len(range(3)[block]) <= max(1, 12 // max(1, width)) for block in blocks)


def test_powers_of_two_are_exact():
    exponent = torch.arange(-125, 128, dtype=torch.int32)

    assert products._power_of_two(exponent).tolist() == [2.0**e for e in range(-125, 128)]

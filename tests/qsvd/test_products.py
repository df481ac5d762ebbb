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


@pytest.fixture
def small_blocks(monkeypatch):
    """Of two rows of twelve."""
    monkeypatch.setattr(products, "_BLOCK_ELEMENTS", 24)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("scale", [1e-30, 1e-6, 1.0, 1e6, 1e30])
@pytest.mark.parametrize("product", ["shrink", "gather"])
def test_on_cuda_the_skinny_factor_is_rounded_and_nothing_else(cuda_way, dtype, scale, product):
    S = torch.randn(3, 50) * scale * torch.tensor([[1.0], [1e-4], [1e6]])
    data = torch.randn(50, 20).to(dtype)
    want = S.double() @ data.double()
    # In fp16 a row is scaled to a largest element of 2^12 at the least, subnormals end at 2^-25.
    lost = UNIT_ROUNDOFF[dtype] * S.abs() + 2.0**-37 * S.abs().amax(dim=1, keepdim=True)
    bound = (lost + 53 * U32 * S.abs()).double() @ data.double().abs()

    found = products.shrink(data.T, S).T if product == "shrink" else products.gather(S.T, data)
    assert found.dtype == torch.float32
    assert_within(found, want, bound)


@pytest.mark.parametrize("dtype", HALVES)
def test_a_product_of_nothing_is_zero(cuda_way, dtype):
    shrunk = products.shrink(torch.ones(5, 0, dtype=dtype), torch.ones(3, 0))
    gathered = products.gather(torch.ones(0, 3), torch.ones(0, 5, dtype=dtype))

    assert torch.equal(shrunk, torch.zeros(5, 3))
    assert torch.equal(gathered, torch.zeros(3, 5))


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize("rows", [0, 1, 37])
def test_products_are_those_of_fp64_on_a_cpu(small_blocks, dtype, rows):
    """
    fp16 comes in blocks of two rows.
    """
    data, S, P = torch.randn(rows, 12).to(dtype), torch.randn(3, 12), torch.randn(rows, 3)
    u = U32 if dtype != torch.bfloat16 else 2.1 * UNIT_ROUNDOFF[dtype]
    for found, left, right in (
        (products.shrink(data, S), data, S.T),
        (products.gather(P, data), P.T, data),
    ):
        want, size = (f(left.double()) @ f(right.double()) for f in (torch.clone, torch.abs))
        bound = (left.shape[1] + 2) * U32 * size + u * size
        assert found.dtype == (torch.bfloat16 if dtype == torch.bfloat16 else torch.float32)
        assert_within(found, want, bound)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("ranks", [1, 12, 13])
@pytest.mark.parametrize("rows", [0, 3, 36, 38])
def test_a_product_in_four_parts_is_the_whole_one(monkeypatch, dtype, ranks, rows):
    """
    Rows that do not divide by four, and operands that are views. Of small whole numbers, so that no
    sum is rounded in any order.
    """
    monkeypatch.setattr(products, "_MANY_ELEMENTS", 0)
    data = torch.randint(-99, 100, (rows, 24)).to(dtype)[:, ::2]
    S = torch.randint(-99, 100, (12, ranks)).to(dtype).T
    found = products.shrink(data, S)

    assert found.dtype == dtype
    assert torch.equal(found.double(), data.double() @ S.T.double())


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
    P = torch.tensor([[2.0**20, 2.0**20], [-(2.0**-8), 0.0]])  # n, rank
    R = torch.tensor([[1.0, 2.0**-12, 1.0], [0.0, 0.0, -1.0]])  # rank, k
    onto = torch.tensor([[0.0, 1.0, 3.0], [0.0, 1.0, 3.0]], dtype=torch.float16)
    found = products.expand(P, R, torch.float16, onto=onto)
    want = torch.tensor([[float("inf"), 257.0, 3.0], [-(2.0**-8), 1.0, 3.0 - 2.0**-8]])

    assert torch.equal(found, want.half())


@pytest.mark.parametrize("way", ["cpu", "cuda"])
def test_fp16_rows_do_not_disturb_each_other(way, request):
    if way == "cuda":
        request.getfixturevalue("cuda_way")
    P, R = torch.randn(5, 3), torch.randn(3, 7)
    alone = products.expand(P, R, torch.float16)
    P[2, 1] = float("nan")
    P[3, 0] = 2.0**40
    found = products.expand(P, R, torch.float16)

    assert torch.equal(found[[0, 1, 4]], alone[[0, 1, 4]])
    assert found[2].isnan().all()


@pytest.mark.parametrize("scale", [2.0**-20, 2.0**-10, 1.0, 2.0**10])
def test_fp16_expansion_is_accurate_at_every_split_of_the_scale(cuda_way, scale):
    P, R = torch.randn(5, 3) * scale, torch.randn(3, 7) / scale
    want = P.double() @ R.double()
    u = UNIT_ROUNDOFF[torch.float16]
    bound = 2.1 * u * (P.abs() @ R.abs()).double() + u * want.abs() + 4 * 2.0**-25

    assert_within(products.expand(P, R, torch.float16), want, bound)


def test_fp16_expansion_is_exact_where_factors_and_sums_fit(cuda_way):
    """
    At either end of what one set of ranks holds, and where two terms of 2^20 cancel.
    """
    P = torch.tensor([[0.5 + 2.0**-11, 0.0], [2.0**15, 0.0], [2.0**20, -(2.0**20)]])  # n, rank
    R = torch.ones(2, 1)  # rank, k
    want = torch.tensor([[0.5 + 2.0**-11], [2.0**15], [0.0]])

    assert torch.equal(products.expand(P, R, torch.float16), want.half())


def test_fp16_expansion_of_a_row_at_the_end_of_fp32_is_exact(cuda_way):
    """2^-127 is no normal fp32 number, and R times 2^-125 would overflow in the second set of ranks."""
    P, R = torch.tensor([[2.0**-126]]), torch.tensor([[1.5 * 2.0**126]])

    assert products.expand(P, R, torch.float16).tolist() == [[1.5]]


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("way", ["cpu", "cuda"])
def test_what_is_added_to_is_written_if_that_is_asked_for(dtype, in_place, way, request):
    if way == "cuda":
        request.getfixturevalue("cuda_way")
    P, R, onto = torch.randn(5, 3), torch.randn(3, 7), torch.randn(5, 7).to(dtype)
    before = onto.clone()
    found = products.expand(P, R, dtype, onto, in_place)
    u = UNIT_ROUNDOFF[dtype]

    assert_within(found, before.double() + P.double() @ R.double(), torch.full((5, 7), 30 * u))
    assert (found is onto) == in_place
    assert in_place or torch.equal(onto, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, *HALVES])
@pytest.mark.parametrize("rows", [0, 1, 37])
@pytest.mark.parametrize("way", ["cpu", "cuda"])
def test_what_is_not_kept_counts_as_zero(small_blocks, dtype, rows, way, request):
    if way == "cuda":
        request.getfixturevalue("cuda_way")
    data, S, P = torch.randn(rows, 12).to(dtype), torch.randn(3, 12), torch.randn(rows, 3)
    kept = torch.randint(0, 2, (rows, 12), dtype=torch.int8)
    u = UNIT_ROUNDOFF[dtype] if dtype in HALVES else U32
    for found, left, right in (
        (products.shrink(data, S, kept), data * kept, S.T),
        (products.gather(P, data, kept), P.T, data * kept),
    ):
        want, size = (f(left.double()) @ f(right.double()) for f in (torch.clone, torch.abs))
        assert found.dtype == products.shrink(data, S).dtype
        assert_within(found, want, ((left.shape[1] + 2) * U32 + 3 * u) * size + 2.0**-25 * rows)


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize("onto", ["nothing", "new", "in place"])
@pytest.mark.parametrize("way", ["cpu", "cuda"])
def test_what_is_not_kept_is_not_expanded(small_blocks, dtype, onto, way, request):
    """
    Ones and small integers: exact in every dtype, and in any order.
    """
    if way == "cuda":
        request.getfixturevalue("cuda_way")
    P, R = torch.randint(-3, 4, (37, 3)).float(), torch.randint(-3, 4, (3, 12)).float()
    kept = torch.randint(0, 2, (37, 12), dtype=torch.int8)
    base = None if onto == "nothing" else torch.randint(-3, 4, (37, 12)).to(dtype)
    before = 0 if base is None else base.clone()
    found = products.expand(P, R, dtype, base, onto == "in place", kept)

    assert torch.equal(found, (before + (P @ R) * kept).to(dtype))
    assert (found is base) == (onto == "in place")
    assert onto != "new" or torch.equal(base, before)


@pytest.mark.parametrize("width", [0, 1, 12, 13, 1000])
def test_rows_of_any_width_come_in_blocks_of_one_at_least(monkeypatch, width):
    monkeypatch.setattr(products, "_BLOCK_ELEMENTS", 12)
    blocks = list(products._steps(torch.empty(3, width)))

    assert sum(len(range(3)[block]) for block in blocks) == 3
    assert all(len(range(3)[block]) <= max(1, 12 // max(1, width)) for block in blocks)


def test_powers_of_two_are_exact():
    exponent = torch.arange(-125, 128, dtype=torch.int32)

    assert products._power_of_two(exponent).tolist() == [2.0**e for e in range(-125, 128)]

"""Products of a skinny fp32 factor with a large tensor of any dtype, each sum accumulated in fp32.

Where the large tensor is in half precision the skinny factor is rounded to that, as autocast would do
it, and the data is read as it is. Of fp16, whose range the factor may leave, that takes more: on CUDA
each of its rows is scaled by a power of two, and the product comes out in fp32 (`out_dtype`, torch
2.8). Elsewhere the data is widened to fp32 some rows at a time, so that no wide copy of it ever exists
and what follows reads it from the cache. (fp16 products on a CPU are a hundred times slower.)

Where only some elements of fp32 data are kept, they are picked some rows at a time on a CPU, for the
same reason.

What is as long as the data is (n, r), a row for each of the data's. A mask `kept` of it is (n, k), bytes
of 0 or 1; the data counts as 0 where it is 0.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

# 1 MiB of fp32: it stays in the cache, and the allocator hands out the same memory for each block.
# Blocks of 4 MiB are as fast where their memory is at hand, and cost 2000 page faults where not.
_BLOCK_ELEMENTS = 2**18
# A half-precision product takes 20 us to begin with, an autograd function 100.
_FEW_ROWS = 32
# Up to these ranks a CPU is faster with the skinny factor as the left one: oneDNN in bf16; MKL in fp32,
# where the data has so many elements.
_FEW_RANKS = 24
_FEWER_RANKS = 12
_MANY_ELEMENTS = 2**16
HALF = (torch.bfloat16, torch.float16)
_HAS_OUT_DTYPE = torch.version.hip is None and hasattr(torch.ops.aten.mm, "dtype")


def few_rows(data: Tensor) -> bool:
    """Whether data (..., k) has so few rows that starting an operation takes longer than doing it."""
    return data.numel() <= _FEW_ROWS * data.shape[-1]


def shrink(data: Tensor, S: Tensor, kept: Tensor | None = None) -> Tensor:
    """`(data * kept) @ S.T`, (n, k) by (r, k) to (n, r).

    S is fp32. Of bf16 data the product is bf16, or fp32 where a device gives that for nothing;
    otherwise it is fp32, or fp64 if either is.
    """
    if _is_in_blocks(data, S, kept):
        S = S.float()
        return torch.cat([_shrink_wide(block, S) for _, block in _blocks(data, kept)])
    data = data if kept is None else data * kept
    if data.dtype == torch.float16:
        return _scaled_product(S, data.T).T
    if data.dtype == torch.bfloat16:
        S = S.to(torch.bfloat16)
        if _gives_fp32(data):
            return _mm_half_into_fp32(data, S.T)
        # Transposed, it is also what `gather` reads.
        return (S @ data.T).T if len(S) <= _FEW_RANKS else data @ S.T
    wide = torch.promote_types(S.dtype, data.dtype)
    return _shrink_wide(data.to(wide), S.to(wide))


def _shrink_wide(data: Tensor, S: Tensor) -> Tensor:
    """`data @ S.T` of one dtype, (n, k) by (r, k) to (n, r)."""
    if torch.compiler.is_compiling() or _on_cuda(data) or len(S) > _FEWER_RANKS:
        return data @ S.T
    if data.numel() < _MANY_ELEMENTS:
        return data @ S.T
    # From the left MKL does not share the rows among its threads, but a batch it does.
    n, k = data.shape
    whole = n // 4 * 4
    product = torch.bmm(S.expand(4, -1, -1), data[:whole].view(4, n // 4, k).mT)
    product = product.transpose(0, 1).flatten(1)
    if whole < n:
        product = torch.cat([product, S @ data[whole:].T], dim=1)
    return product.T  # the transpose of which is what `gather` reads


def gather(P: Tensor, data: Tensor, kept: Tensor | None = None) -> Tensor:
    """`P.T @ (data * kept)`, (n, r) by (n, k) to (r, k).

    The dtypes are those of `shrink`, of which P is a result.
    """
    if _is_in_blocks(data, P, kept):
        P = P.float()
        parts = [P[at].T @ block for at, block in _blocks(data, kept)]
        return sum(parts[1:], start=parts[0])
    data = data if kept is None else data * kept
    # Contiguous: a BLAS takes a fifth longer to read the transpose.
    if data.dtype == torch.float16:
        return _scaled_product(P.T.contiguous(), data)
    if data.dtype == torch.bfloat16:
        PT = P.to(torch.bfloat16).T.contiguous()
        return _mm_half_into_fp32(PT, data) if _gives_fp32(data) else PT @ data
    wide = torch.promote_types(P.dtype, data.dtype)
    return P.to(wide).T.contiguous() @ data.to(wide)


def expand(
    P: Tensor,
    R: Tensor,
    dtype: torch.dtype,
    onto: Tensor | None = None,
    in_place: bool = False,
    kept: Tensor | None = None,
) -> Tensor:
    """`(P @ R) * kept`, plus `onto` if given, (n, r) by (r, k) to (n, k), in `dtype`.

    `onto` has `dtype`, and is written if `in_place`. In fp16 no factor is rounded out of range: where
    the result is finite, so is everything that leads to it.
    """
    if kept is not None:
        return _expanded_where_kept(P, R, dtype, onto, in_place, kept)
    if dtype == torch.float16:
        P, R = P.float(), R.float()
        if not _on_cuda(P):
            return _expanded_by_blocks(P, R, onto, in_place)
        P, R = _fitted_to_fp16(P, R)
    else:
        P, R = P.to(dtype), R.to(dtype)
    if onto is None:
        return P @ R
    return onto.addmm_(P, R) if in_place else torch.addmm(onto, P, R)


def _expanded_by_blocks(P: Tensor, R: Tensor, onto: Tensor | None, in_place: bool) -> Tensor:
    result = P.new_empty(P.shape[0], R.shape[1], dtype=torch.float16)
    if in_place and onto is not None:
        result = onto
    for at in _steps(result):
        result[at] = P[at] @ R if onto is None else torch.addmm(onto[at].float(), P[at], R)
    return result


def _expanded_where_kept(
    P: Tensor, R: Tensor, dtype: torch.dtype, onto: Tensor | None, in_place: bool, kept: Tensor
) -> Tensor:
    if onto is None:
        return expand(P, R, dtype) * kept
    if not in_place:
        return torch.addcmul(onto, expand(P, R, dtype), kept)
    for at in _steps(kept) if _is_in_blocks(onto, P, kept) else [slice(None)]:
        onto[at].addcmul_(expand(P[at], R, dtype), kept[at])
    return onto


def _is_in_blocks(data: Tensor, factor: Tensor, kept: Tensor | None) -> bool:
    """Whether data is multiplied some rows at a time, for it is made fp32, or picked, before."""
    picked = kept is not None and data.dtype == factor.dtype == torch.float32
    return _is_widened(data) or (picked and not _on_cuda(data))


def _blocks(data: Tensor, kept: Tensor | None) -> Iterator[tuple[slice, Tensor]]:
    """Which rows of data, and these in fp32, where they are kept."""
    for at in _steps(data):
        block = data[at].float()
        yield at, block if kept is None else block * kept[at]


def _steps(data: Tensor) -> Iterator[slice]:
    """The rows of data (n, k) in blocks; one empty block for n = 0.

    Compiled, it is one block: a loop would fix n, and compile again for each other one.
    """
    n, width = data.shape
    if torch.compiler.is_compiling():
        yield slice(0, n)
        return
    step = max(1, _BLOCK_ELEMENTS // max(1, width))
    for start in range(0, max(1, n), step):
        yield slice(start, start + step)


def _is_widened(data: Tensor) -> bool:
    """Whether data is multiplied in fp32, though it is in half precision."""
    return data.dtype == torch.float16 and not _gives_fp32(data)


def _gives_fp32(data: Tensor) -> bool:
    """Whether half-precision data is multiplied into fp32 by one operation."""
    return _on_cuda(data) and _HAS_OUT_DTYPE


def _on_cuda(t: Tensor) -> bool:
    return t.is_cuda


def _mm_half_into_fp32(a: Tensor, b: Tensor) -> Tensor:
    """`a @ b` for half-precision a (m, k) and b (k, n), accumulated and returned in fp32. CUDA."""
    return torch.mm(a, b, out_dtype=torch.float32)


def _scaled_product(S: Tensor, data: Tensor) -> Tensor:
    """`S @ data` in fp32, for S (r, m) and fp16 data (m, k), on CUDA.

    A power of two brings every row's largest element just below 2^13, where fp16 has all its bits.
    """
    exponent = _row_exponent(S) - 13
    product = _mm_half_into_fp32((S * _power_of_two(-exponent)).half(), data)
    return product * _power_of_two(exponent)


def _fitted_to_fp16(P: Tensor, R: Tensor) -> tuple[Tensor, Tensor]:
    """fp16 factors (n, 2r) and (2r, k) whose product is that of fp32 P (n, r) and R (r, k).

    Each rank is rescaled by an exact power of two so that R's largest element lies in [1/2, 1).
    Then an element of P is as large as the largest term that it enters, so it underflows only where
    its terms do, and overflows only where one of them does. Such terms may still cancel, or miss
    the columns where R is small: elements of P above 2^15 go to a second set of r ranks, scaled by
    2^-15 there and by 2^15 in R. That covers terms up to 2^30, beyond which an fp32 sum that ends
    inside fp16's range has lost its digits. Each row of the result depends on its own row of P
    alone, so rows do not disturb each other.
    """
    exponent = _row_exponent(R)
    R = R * _power_of_two(-exponent)
    P = P * _power_of_two(exponent).T
    large = P.abs() > 2.0**15
    P = torch.cat([P.masked_fill(large, 0.0), (P * 2.0**-15).masked_fill(~large, 0.0)], dim=1)
    return P.half(), torch.cat([R, R * 2.0**15]).half()


def _row_exponent(S: Tensor) -> Tensor:
    """e (r, 1), int32, with 2^(e-1) <= max|row| < 2^e, where 2^e and 2^-e are normal fp32."""
    if S.shape[1] == 0:
        return S.new_zeros(S.shape[0], 1, dtype=torch.int32)
    return torch.frexp(S.abs().amax(dim=1, keepdim=True)).exponent.clamp(-100, 126)


def _power_of_two(exponent: Tensor) -> Tensor:
    """2^exponent, fp32, written into the exponent's bits: `pow` is not exact on every device."""
    return ((exponent + 127) << 23).view(torch.float32)

"""Products of a skinny fp32 factor with a large tensor of any dtype, each sum accumulated in fp32.

Where the large tensor is in half precision the skinny factor is rounded to that, as autocast would do
it, and the data is read as it is. Two cases need more:

- fp16, whose range the factor may leave: on CUDA each of its rows is scaled by a power of two, and
  the product comes out in fp32 (`out_dtype`, torch 2.8). Elsewhere the data is widened to fp32 some
  rows at a time, so that no wide copy of it ever exists and what follows reads it from the cache.
  (fp16 products on a CPU are a hundred times slower.)
- Few rows on a CPU, where a product in fp32 is the quicker one.

The skinny factor comes first because a BLAS is up to eight times faster at (r, n) by (n, k) than at
the transpose of that.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

# 1 MiB of fp32: it stays in the cache, and the allocator hands out the same memory for each block.
# Blocks of 4 MiB are as fast where their memory is at hand, and cost 2000 page faults where not.
_BLOCK_ELEMENTS = 2**18
# Up to as many rows a CPU is faster in fp32: a half-precision product takes 20 us to begin with.
_FEW_ROWS = 32
HALF = (torch.bfloat16, torch.float16)
_HAS_OUT_DTYPE = torch.version.hip is None and hasattr(torch.ops.aten.mm, "dtype")


def steps(*data: Tensor) -> Iterator[slice]:
    """In what steps to go through the rows of (n, k), (n, l), ...: at least one, be n = 0.

    A CPU takes what is in fp32, or widened to it, in blocks that stay in its cache.
    """
    if not any(map(_to_widen, data)) and (len(data) == 1 or not any(map(_wide_on_cpu, data))):
        yield slice(0, data[0].shape[0])
    else:
        yield from _steps(data[0].shape[0], max(t.shape[1] for t in data))


def widened(data: Tensor) -> Tensor:
    """Data (n, k) in a dtype that `times` takes."""
    return data.float() if _to_widen(data) else data


def few_rows(data: Tensor) -> bool:
    """Whether data (..., k) has so few rows that a half-precision product would be the slower one."""
    return not _on_cuda(data) and data.numel() <= _FEW_ROWS * data.shape[-1]


def times(S: Tensor, data: Tensor) -> Tensor:
    """`S @ data`, (r, m) by (m, k) to (r, k).

    S is fp32, or a former product. Of bf16 data the product is bf16, or fp32 where a device gives
    that for nothing; otherwise it is fp32, or fp64 if either is.
    """
    if data.dtype == torch.float16:
        return _scaled_product(S, data)
    if data.dtype == torch.bfloat16:
        S = S.to(torch.bfloat16)
        return _mm_half_into_fp32(S, data) if _on_cuda(data) and _HAS_OUT_DTYPE else S @ data
    wide = torch.promote_types(S.dtype, data.dtype)
    return S.to(wide) @ data.to(wide)


def expand(S: Tensor, R: Tensor, dtype: torch.dtype, onto: Tensor | None = None) -> Tensor:
    """`S.T @ R`, plus `onto` if given, (r, n) by (r, k) to (n, k), in `dtype`.

    `onto` has `dtype` and is not written. In fp16 no factor is rounded out of range: where the
    result is finite, so is everything that leads to it.
    """
    few = dtype in HALF and few_rows(S.T)
    if dtype != torch.float16 and not few:
        return _expand(S.to(dtype), R.to(dtype), onto)
    S, R = S.float(), R.float()
    if _on_cuda(S):
        return _expand(*_fitted_to_fp16(S, R), onto)
    if few:
        return _expand(S, R, None if onto is None else onto.float()).to(dtype)
    result = S.new_empty(S.shape[1], R.shape[1], dtype=dtype)
    for at in _steps(*result.shape):
        result[at] = _expand(S[:, at], R, None if onto is None else onto[at].float())
    return result


def _expand(S: Tensor, R: Tensor, onto: Tensor | None = None) -> Tensor:
    # Contiguous: a BLAS takes a fifth longer to read the transpose.
    ST = S.T.contiguous()
    return ST @ R if onto is None else torch.addmm(onto, ST, R)


def _steps(n: int, width: int) -> Iterator[slice]:
    """n rows of a matrix of some width in blocks; one empty block for n = 0.

    Compiled, it is one block: a loop would fix n, and compile again for each other one.
    """
    if torch.compiler.is_compiling():
        yield slice(0, n)
        return
    step = max(1, _BLOCK_ELEMENTS // max(1, width))
    for start in range(0, max(1, n), step):
        yield slice(start, start + step)


def _to_widen(data: Tensor) -> bool:
    """Whether data is multiplied in fp32, though it is in half precision."""
    if data.dtype == torch.float16:
        return not (_on_cuda(data) and _HAS_OUT_DTYPE)
    return data.dtype == torch.bfloat16 and few_rows(data)


def _wide_on_cpu(data: Tensor) -> bool:
    return not _on_cuda(data) and data.dtype not in HALF


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


def _fitted_to_fp16(S: Tensor, R: Tensor) -> tuple[Tensor, Tensor]:
    """fp16 factors (2r, n) and (2r, k) whose product is that of fp32 S (r, n) and R (r, k).

    Each rank is rescaled by an exact power of two so that R's largest element lies in [1/2, 1).
    Then an element of S is as large as the largest term that it enters, so it underflows only where
    its terms do, and overflows only where one of them does. Such terms may still cancel, or miss
    the columns where R is small: elements of S above 2^15 go to a second set of r ranks, scaled by
    2^-15 there and by 2^15 in R. That covers terms up to 2^30, beyond which an fp32 sum that ends
    inside fp16's range has lost its digits. Each row of the result depends on its own column of S
    alone, so rows do not disturb each other.
    """
    exponent = _row_exponent(R)
    R = R * _power_of_two(-exponent)
    S = S * _power_of_two(exponent)
    large = S.abs() > 2.0**15
    S = torch.cat([S.masked_fill(large, 0.0), (S * 2.0**-15).masked_fill(~large, 0.0)])
    return S.half(), torch.cat([R, R * 2.0**15]).half()


def _row_exponent(S: Tensor) -> Tensor:
    """e (r, 1), int32, with 2^(e-1) <= max|row| < 2^e, where 2^e and 2^-e are normal fp32."""
    if S.shape[1] == 0:
        return S.new_zeros(S.shape[0], 1, dtype=torch.int32)
    return torch.frexp(S.abs().amax(dim=1, keepdim=True)).exponent.clamp(-100, 126)


def _power_of_two(exponent: Tensor) -> Tensor:
    """2^exponent, fp32, written into the exponent's bits: `pow` is not exact on every device."""
    return ((exponent + 127) << 23).view(torch.float32)

"""The rules by which other projects decide that a result is right, as their suites apply them.

Each was looked up in its repository at the commit named; only the formula is taken. Three things
hold for all of them:

- Suites that compare with an eager run get the layer as everybody writes it (`eager.Plain`) in the
  same dtypes over the same base layer; those that compare with a better reference get the truth.
- Many of them only look at outputs. Here each is asked about the gradients as well, with the same
  tolerance: that can only help it to find faults.
- Values are compared, not dtypes, and no NaN or infinity is accepted, whatever the formula says.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch

from conformance.case import DTYPES, DType
from tests.field.reading import EPSILON, ROUNDOFF, Reading

Accepts = Callable[[Reading], bool]
HALF: tuple[DType, ...] = ("bfloat16", "float16")


@dataclass(frozen=True)
class Rule:
    """A rule: whether it accepts a tensor, and whence it is.

    dtypes: the input dtypes for which its project uses it.
    for_fp32_adapters: it may only be held against a port that declares fp32 adapters.
    """

    name: str
    accepts: Accepts
    source: str
    dtypes: tuple[DType, ...] = DTYPES
    for_fp32_adapters: bool = False

    def __call__(self, reading: Reading) -> bool:
        return reading.finite and self.accepts(reading)


RULES: dict[str, Rule] = {}


def rule(
    name: str, source: str, dtypes: tuple[DType, ...] = DTYPES
) -> Callable[[Accepts], Accepts]:
    """Enter a rule into the table."""

    def enter(accepts: Accepts) -> Accepts:
        RULES[name] = Rule(name, accepts, source, dtypes)
        return accepts

    return enter


def close(one: torch.Tensor, other: torch.Tensor, rtol: float, atol: float) -> bool:
    """|one - other| <= atol + rtol |other|, by torch's own function, in the tensors' dtype."""
    return torch.allclose(one, other, rtol=rtol, atol=atol)


# --- a constant for each dtype --------------------------------------------------------------------


@rule(
    "allclose 1e-2 (BackendBench)",
    "meta-pytorch/BackendBench 015f5cb, BackendBench/eval.py: assert_close(eager, port, atol=1e-2, "
    "rtol=1e-2), so the relative part is of the port's own value",
)
def backend_bench(r: Reading) -> bool:
    return close(r.expected.eager, r.got, 1e-2, 1e-2)


@rule(
    "1e-2 absolute or relative (FlashInfer-Bench)",
    "flashinfer-ai/flashinfer-bench 1039e39 bench/config.py and 00a1ec8 bench/utils.py: wrong where "
    "|error| > 1e-2 and |error| / (|eager| + 1e-8) > 1e-2",
)
def flashinfer_bench(r: Reading) -> bool:
    eager, got = r.expected.eager.float(), r.got.float()
    error = (got - eager).abs()
    return not bool(((error > 1e-2) & (error / (eager.abs() + 1e-8) > 1e-2)).any())


_KERNEL_BENCH: Mapping[DType, float] = {"float32": 1e-4, "float16": 1e-2, "bfloat16": 1e-2}


@rule(
    "allclose per dtype (KernelBench)",
    "ScalingIntelligence/KernelBench 0d12226, src/kernelbench/eval.py, get_tolerance_for_precision: "
    "fp32 1e-4, fp16 and bf16 1e-2, absolute and relative, allclose(eager, port)",
)
def kernel_bench(r: Reading) -> bool:
    tolerance = _KERNEL_BENCH[r.expected.io]
    return close(r.expected.eager, r.got, tolerance, tolerance)


# (rtol, atol)
_TORCH: Mapping[torch.dtype, tuple[float, float]] = {
    torch.float16: (1e-3, 1e-5),
    torch.bfloat16: (1.6e-2, 1e-5),
    torch.float32: (1.3e-6, 1e-5),
}


@rule(
    "assert_close defaults (PyTorch, Transformer Engine)",
    "pytorch 2.13 torch/testing/_comparison.py, _DTYPE_PRECISIONS; the same table is dtype_tols of "
    "NVIDIA/TransformerEngine 009e651, tests/pytorch/utils.py",
)
def torch_defaults(r: Reading) -> bool:
    return close(r.got, r.expected.eager, *_TORCH[r.got.dtype])


@rule(
    "assert_close defaults of the input's dtype",
    "the same table, but for the fp32 gradients of parameters, too, by the dtype of the input: "
    "kinder to a port that computes in that dtype",
)
def torch_defaults_of_input(r: Reading) -> bool:
    dtype = getattr(torch, r.expected.io)
    return close(r.got, r.expected.eager, *_TORCH[dtype])


_LIGER_SWIGLU: Mapping[DType, tuple[float, float]] = {
    "float32": (1e-5, 1e0),
    "bfloat16": (1e-2, 1e4),
}
_LIGER_NORM: Mapping[DType, tuple[float, float]] = {
    "float32": (1e-5, 1e-5),
    "bfloat16": (2e-2, 2e-2),
}
_LIGER_DTYPES: tuple[DType, ...] = ("float32", "bfloat16")


@rule(
    "allclose, SwiGLU's table (Liger-Kernel)",
    "linkedin/Liger-Kernel ead96b6, test/transformers/test_swiglu.py, outputs and gradients of a "
    "linear MLP: fp32 atol 1, rtol 1e-5; bf16 atol 1e4, rtol 1e-2",
    _LIGER_DTYPES,
)
def liger_swiglu(r: Reading) -> bool:
    return close(r.expected.eager, r.got, *_LIGER_SWIGLU[r.expected.io])


@rule(
    "allclose, LayerNorm's table (Liger-Kernel)",
    "linkedin/Liger-Kernel ead96b6, test/transformers/test_layer_norm.py, its tightest: fp32 1e-5, "
    "bf16 2e-2, absolute and relative",
    _LIGER_DTYPES,
)
def liger_layer_norm(r: Reading) -> bool:
    return close(r.expected.eager, r.got, *_LIGER_NORM[r.expected.io])


@rule(
    "merge tolerance, 4-bit (PEFT)",
    "huggingface/peft 0000e79, tests/test_common_gpu.py, test_4bit_merge_lora: atol 0.01, rtol 10",
)
def peft_merge_4bit(r: Reading) -> bool:
    return close(r.expected.eager, r.got, rtol=10.0, atol=0.01)


@rule(
    "merge tolerance, 8-bit (PEFT)",
    "huggingface/peft 0000e79, tests/test_common_gpu.py, test_8bit_merge_lora: atol 1e-3, rtol 1",
)
def peft_merge_8bit(r: Reading) -> bool:
    return close(r.expected.eager, r.got, rtol=1.0, atol=1e-3)


@rule(
    "merge tolerance, 4-bit, after softmax (PEFT)",
    "the same test as it stands: probabilities are compared, and no gradient is looked at",
)
def peft_merge_softmax(r: Reading) -> bool:
    if r.expected.part != "y":
        return True
    eager, got = (t.float().softmax(-1) for t in (r.expected.eager, r.got))
    return close(eager, got, rtol=10.0, atol=0.01)


# --- a multiple of what eager arithmetic loses ----------------------------------------------------


def _largest(difference: torch.Tensor) -> float:
    return float(difference.abs().max()) if difference.numel() else 0.0


@rule(
    "2x eager error, gradients 3x (flash-attention 2)",
    "Dao-AILab/flash-attention 0251105, tests/test_flash_attn.py: max|out - ref| <= 2 max|pt - ref|, "
    "3 for gradients; ref is computed in fp32 and rounded, pt is eager in the input's dtype",
    HALF,
)
def flash_attention_2(r: Reading) -> bool:
    times = 2.0 if r.expected.part == "y" else 3.0
    reference = r.expected.reference
    return _largest(r.got - reference) <= times * _largest(r.expected.low - reference)


@rule(
    "2x eager error + rounding at 0.3 (flash-attention 3)",
    "Dao-AILab/flash-attention 0251105, hopper/test_flash_attn.py: max|out - ref| <= 2 max|pt - ref| "
    "+ 2 max|ref + 0.3 - 0.3 - ref|, for outputs and gradients",
    HALF,
)
def flash_attention_3(r: Reading) -> bool:
    reference = r.expected.reference
    allowance = 2.0 * _largest(reference + 0.3 - 0.3 - reference)
    return _largest(r.got - reference) <= 2.0 * _largest(r.expected.low - reference) + allowance


# --- a multiple of the roundoff, of norms or of each element's terms ------------------------------


@rule(
    "residual < 30 (LAPACK)",
    "Reference-LAPACK/lapack eec055e, TESTING/LIN/sqrt01.f and 5679332, TESTING/stest.in: "
    "|error|_1 / (N |A|_1 eps) < 30; here |A|_1 is the product of the operands' norms plus the base "
    "output's, N the longest sum, eps that of the input's dtype (LAPACK has no 16-bit routines)",
)
def lapack(r: Reading) -> bool:
    size, u = r.expected.size, ROUNDOFF[r.expected.io]
    error = float(np.abs(r.error).reshape(-1, r.error.shape[-1]).sum(axis=0).max(initial=0.0))
    return error < 30.0 * max(size.inner) * (size.one + size.base_one) * u or error == 0.0


@rule(
    "16 eps of each element's terms (BLAS test programs)",
    "Reference-LAPACK/lapack 036011f, BLAS/TESTING/sblat3.f, SMMCH, and 19b0016, sblat3.in: "
    "|error| / (eps g) < 16, where g sums the magnitudes of the element's terms",
)
def blas(r: Reading) -> bool:
    limit = 16.0 * EPSILON[r.expected.io] * r.expected.size.elements
    return bool(((r.error < limit) | (r.error == 0.0)).all())


@rule(
    "sqrt(k + 2) of the norms (BLAS++)",
    "icl-utk-edu/blaspp 12c0d68, test/check_gemm.hh: |error|_F / (sqrt(k + 2) |A|_F |B|_F + 2 |C|_F) "
    "< u; here k is the sum of the lengths of the chain's sums",
)
def blaspp(r: Reading) -> bool:
    size, u = r.expected.size, ROUNDOFF[r.expected.io]
    error = float(np.sqrt((r.error**2).sum()))
    limit = np.sqrt(sum(size.inner) + 2.0) * size.frobenius + 2.0 * size.base_frobenius
    return error < u * limit or error == 0.0


# fp32: get_epsilon<float>(), the distance from 1 to the next number.
_ROCBLAS: Mapping[DType, float] = {
    "float32": EPSILON["float32"],
    "bfloat16": 1.0 / 100.0,
    "float16": 1.0 / 900.0,
}


@rule(
    "K sum_error_tolerance (rocBLAS)",
    "ROCm/rocBLAS 0042aef, clients/include/near.hpp: |error| <= K * sum_error_tolerance, which is "
    "absolute, and made for that suite's data, which are of order one: 1/100 in bf16, 1/900 in fp16; "
    "K is the sum of the lengths of the chain's sums",
)
def rocblas(r: Reading) -> bool:
    limit = sum(r.expected.size.inner) * _ROCBLAS[r.expected.io]
    return bool((r.error <= limit).all())

"""Layers to test with, and what they must compute, in float64 with a bound for every element."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import pytest
import torch
from bitsandbytes.functional import has_avx512bf16
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from torch import Tensor, nn

import qsvd
from qsvd._arithmetic import Adapter, adapted
from qsvd._dropout import Mask

avx512bf16 = pytest.mark.skipif(not has_avx512bf16(), reason="needs a CPU with AVX512-BF16")
Kind = Literal["4bit", "8bit"]
KINDS: tuple[Kind, ...] = ("4bit", "8bit")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
PARAMETERS = ("lora_A", "lora_E", "lora_B")
U32 = 2.0**-24
UNIT_ROUNDOFF = {torch.float32: U32, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
# Half the spacing of the subnormal numbers: what one rounding can lose however small the value.
UNDERFLOW = {torch.float32: 2.0**-149, torch.bfloat16: 2.0**-133, torch.float16: 2.0**-25}


def unquantised_base(kind: Kind, n_in: int = 64, n_out: int = 32, **options: Any) -> nn.Module:
    """A bitsandbytes layer with random weights that has not been moved, so not been quantised."""
    if kind == "4bit":
        return Linear4bit(n_in, n_out, **{"quant_type": "nf4", **options})
    return Linear8bitLt(n_in, n_out, has_fp16_weights=False, **options)


def base_layer(kind: Kind, n_in: int = 64, n_out: int = 32, **options: Any) -> nn.Module:
    """A quantised bitsandbytes layer on the CPU, nf4 double quantised or int8, with a bias."""
    return unquantised_base(kind, n_in, n_out, **options).to("cpu")


def layer(
    kind: Kind, r: int = 4, *, base: nn.Module | None = None, **options: Any
) -> qsvd.SVDLayer:
    """A layer whose adapter `default` is as it was created: the identity."""
    base = base_layer(kind) if base is None else base
    return qsvd.layer_for(base)(base, "default", r=r, **options)


def randomised(layer: qsvd.SVDLayer) -> qsvd.SVDLayer:
    """The layer with every adapter's A, E and B drawn from N(0, 1)."""
    for parameters in (layer.lora_A, layer.lora_E, layer.lora_B):
        for parameter in parameters.values():
            nn.init.normal_(parameter)
    return layer


def step(layer: qsvd.SVDLayer, x: Tensor) -> list[Tensor]:
    """One training step's output and gradients, of a layer with an adapter `default`, in train mode."""
    mode = layer.training
    layer.zero_grad()
    leaf = x.detach().clone().requires_grad_(True)
    y = layer.train()(leaf)
    y.sum().backward()
    layer.train(mode)
    parameters = (layer.lora_A, layer.lora_E, layer.lora_B)
    return [y.detach(), leaf.grad, *(p["default"].grad.clone() for p in parameters)]


@dataclass
class Expected:
    """The contract in float64 given the base layer's output and gradient, and how far off is right.

    Every stored value in the input's dtype costs one roundoff u of that dtype: Q = A * E * c, h and
    B are rounded once each on the way to y, and y once. A sum of n products in fp32 costs
    g(n) = n u32 / (1 - n u32) of the sum of the magnitudes. c, E * c and Q cost 5 roundoffs of fp32.
    """

    y: Tensor
    y_bound: Tensor
    dx: Tensor
    dx_bound: Tensor
    gradients: dict[str, tuple[Tensor, Tensor]]


def expected(
    layer: qsvd.SVDLayer,
    x: Tensor,
    dy: Tensor,
    name: str = "default",
    half: bool | None = None,
    autocast: torch.dtype | None = None,
) -> Expected:
    """What one forward and backward must give for x (n, in) and dy (n, out).

    `half` says whether products that lead to parameter gradients are of x's half-precision dtype:
    the skinny factor, h or P, and the result cost a roundoff each, of which the sums are free. By
    default bf16's are, if there are more than 32 rows; all others are accurate to fp32. Of so many
    rows autocast to bf16 rounds fp32 x and dy, at a roundoff each; autocast to fp16 does not.
    """
    leaf = x.detach().clone().requires_grad_(True)
    with torch.autocast("cpu", dtype=autocast, enabled=autocast is not None):
        y0 = layer.base_layer(leaf)
    y0.backward(dy.to(y0.dtype))
    rounded = autocast == torch.bfloat16 and x.dtype == torch.float32 and len(x) > 32
    u = max(UNIT_ROUNDOFF[t] for t in (x.dtype, y0.dtype, *([autocast] if rounded else [])))
    u_x, u_y = UNIT_ROUNDOFF[x.dtype], UNIT_ROUNDOFF[y0.dtype]
    tiny = max(UNDERFLOW[x.dtype], UNDERFLOW[y0.dtype])
    given = 1 if rounded else 0
    A, E, B = (p[name].detach().double() for p in (layer.lora_A, layer.lora_E, layer.lora_B))
    c = layer.scaling[name] / (layer.ranknum[name].double() + 1e-5)
    X, G, Y0, DX0 = x.double(), dy.double(), y0.detach().double(), leaf.grad.double()
    Q, r = A * E * c, A.shape[0]
    g_in, g_out, g_r, g_n = (_g(n) for n in (X.shape[1], G.shape[1], r, X.shape[0]))

    y = Y0 + X @ Q.T @ B.T
    products = X.abs() @ Q.abs().T @ B.abs().T
    # 1.02 for products of the roundoffs, of which the largest is 5 * 2^-8 squared.
    y_bound = (3 + given) * u + 7 * U32 + g_in + g_r
    y_bound = 1.02 * (y_bound * products + u_y * y.abs() + U32 * Y0.abs())
    y_bound += tiny * (2 + B.abs().sum(1) + X.abs().sum(1, keepdim=True) * B.abs().sum())

    P = G @ B
    dx = DX0 + P @ Q
    products = G.abs() @ B.abs() @ Q.abs()
    dx_bound = (3 + given) * u + 7 * U32 + g_out + g_r
    dx_bound = 1.02 * (dx_bound * products + u_x * (P @ Q).abs())
    dx_bound += u_x * dx.abs() + tiny * (2 + Q.abs().sum(0) + P.abs().sum(1, keepdim=True))

    if half is None:
        half = rounded or (torch.bfloat16 in (x.dtype, y0.dtype) and len(x) > 32)
    v = 8 * U32 + (1.02 * (3 + 2 * given) * u if half else 0.0)
    h_abs, P_abs = X.abs() @ Q.abs().T, G.abs() @ B.abs()
    dQ, dQ_abs = P.T @ X, P_abs.T @ X.abs()
    dQ_bound = (g_out + g_n + v) * dQ_abs
    dB_bound = (g_in + g_n + v) * (G.abs().T @ h_abs)
    return Expected(
        y=y,
        y_bound=y_bound,
        dx=dx,
        dx_bound=dx_bound,
        gradients={
            "lora_A": (dQ * E * c, dQ_bound * (E * c).abs() + UNDERFLOW[torch.float32]),
            "lora_E": (
                (dQ * A).sum(1, keepdim=True) * c,
                ((dQ_bound + (g_in + 4 * U32) * dQ_abs) * A.abs()).sum(1, keepdim=True) * c
                + UNDERFLOW[torch.float32],
            ),
            "lora_B": (G.T @ (X @ Q.T), dB_bound + UNDERFLOW[torch.float32]),
        },
    )


def gradients(
    layer: qsvd.SVDLayer, x: Tensor, dy: Tensor, name: str = "default"
) -> tuple[Tensor, dict[str, Tensor]]:
    """dx and the parameters' gradients of one forward and backward, from x (n, in), dy (n, out)."""
    layer.zero_grad()
    leaf = x.detach().clone().requires_grad_(True)
    layer(leaf).backward(dy)
    return leaf.grad, {p: getattr(layer, p)[name].grad.clone() for p in PARAMETERS}


def updated(
    base: Tensor | Callable[[Tensor], Tensor],
    x: Tensor,
    A: Tensor,
    E: Tensor,
    B: Tensor,
    c: Any,
    mask: Mask | None = None,
    private: bool = False,
) -> Tensor:
    """`base(x)`, or a `base` that is there already, plus the update of an adapter with ranknum 1."""
    adapter = Adapter(nn.Identity(), A, E, B, c, 1.0 - 1e-5)
    call_base = base if callable(base) else lambda x: base
    return adapted(call_base, x, [adapter], lambda: private, drop=lambda dropout, x: (x, mask))


def assert_within(got: Tensor, want: Tensor, bound: Tensor) -> None:
    """Every element of `got` within its bound; NaN never is."""
    error = (got.detach().double() - want).abs()
    worst = (error / bound).max() if error.numel() else torch.tensor(0.0)
    assert bool((error <= bound).all()), f"error is up to {float(worst):.3g} times its bound"


def bits(t: Tensor) -> Tensor:
    """The bit pattern of a floating tensor, to compare -0.0 and NaN too."""
    return t.detach().contiguous().view({2: torch.int16, 4: torch.int32}[t.element_size()])


def _g(n: int) -> float:
    return n * U32 / (1 - n * U32)

"""`python -m tests.primitives [name ...]`: the measurements that decided how the layers compute.

All, or those that are named. They are written to docs/performance/primitives.json.

Each is one question with its alternatives, in turns, on one thread and the processor's own clock: what
docs/performance/tried.toml tells of is what came of them.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.nn.functional import dropout

from conformance.benchmarks.timing import calls_for, interleaved, median
from qsvd import _dropout, _products
from qsvd._arithmetic import Adapter, adapted
from qsvd._importance import update_averages
from qsvd._penalty import _mean_distance

TARGET = Path(__file__).parents[2] / "docs" / "performance" / "primitives.json"
CPU = torch.device("cpu")
N, D, R = 2048, 1024, 8
Alternatives = Mapping[str, Callable[[], object]]


def adding(dtype: torch.dtype) -> Alternatives:
    """P @ Q added to what the base layer wrote, be it y or dx."""
    base, P, Q = (torch.randn(*s).to(dtype) for s in ((N, D), (N, R), (R, D)))
    return {
        "in place": lambda: base.addmm_(P, Q),
        "out of place": lambda: torch.addmm(base, P, Q),
        "product, then sum": lambda: base.add_(P @ Q),
    }


def orientation(dtype: torch.dtype) -> Alternatives:
    """A skinny factor on the left or on the right of the data."""
    x, Q, h = torch.randn(N, D, dtype=dtype), torch.randn(R, D, dtype=dtype), torch.randn(R, N)
    h = h.to(dtype)
    return {
        "Q @ x.T": lambda: Q @ x.T,
        "x @ Q.T": lambda: x @ Q.T,
        "h @ x": lambda: h @ x,
        "x.T @ h.T": lambda: x.T @ h.T,
    }


def ranks() -> Alternatives:
    """x @ Q.T in bf16 for other numbers of ranks, with Q on the right, or on the left as `shrink` has it."""
    x = torch.randn(N, D).bfloat16()
    found: dict[str, Callable[[], object]] = {}
    for r in (8, 16, 24, 32, 64):
        Q = torch.randn(r, D).bfloat16()
        found[f"{r}, right"] = lambda Q=Q: x @ Q.T
        found[f"{r}, left"] = lambda Q=Q: (Q @ x.T).T
    return found


def parts() -> Alternatives:
    """dy @ B in fp32: B on the right, on the left, and on the left of a batch of four parts of dy."""
    dy = torch.randn(N, D)
    found: dict[str, Callable[[], object]] = {}
    for r in (4, 8, 12, 16):
        B = torch.randn(D, r)

        def in_parts(r: int = r, B: Tensor = B) -> Tensor:
            with mock.patch.object(_products, "_FEWER_RANKS", r):
                return _products.shrink(dy, B.T)

        found[f"{r}, right"] = lambda B=B: dy @ B
        found[f"{r}, left"] = lambda B=B: (B.T @ dy.T).T
        found[f"{r}, parts"] = in_parts
    return found


def rounding() -> Alternatives:
    """Both products of fp32 dy, for P and for dB, as it is or rounded to bf16 before."""
    dy, B, h = torch.randn(N, D), torch.randn(D, R), torch.randn(N, R)

    def products(of: Tensor) -> None:
        _products.shrink(of, B.T)
        _products.gather(h, of)

    def in_blocks() -> None:
        for start in range(0, N, 256):
            block = dy[start : start + 256].bfloat16()
            _products.shrink(block, B.T)
            _products.gather(h[start : start + 256], block)

    return {
        "fp32": lambda: products(dy),
        "bf16": lambda: products(dy.bfloat16()),
        "bf16, in blocks": in_blocks,
    }


def few_rows(n: int) -> Alternatives:
    """An adapter's forward and backward over n rows of bf16, by functions or by operations."""
    x, base, dy = (torch.randn(n, D).bfloat16() for _ in range(3))
    A, E, B = (torch.randn(*s).requires_grad_(True) for s in ((R, D), (R, 1), (D, R)))
    adapters = [Adapter(torch.nn.Identity(), A, E, B, 0.5, 1.0)]

    def step(most: int) -> Callable[[], None]:
        def run() -> None:
            with mock.patch.object(_products, "_FEW_ROWS", most):
                y = adapted(
                    lambda x: base,
                    x.detach().requires_grad_(True),
                    adapters,
                    is_private=lambda: False,
                )
                y.backward(dy)
                A.grad = E.grad = B.grad = None

        return run

    return {"functions, bf16": step(0), "operations, fp32": step(n)}


def block_size() -> Alternatives:
    """The two products of dy in fp32, for P and for dB, by rows of a block."""
    dy, B, h = torch.randn(N, D), torch.randn(D, R), torch.randn(N, R)

    def in_blocks(rows: int) -> Callable[[], None]:
        def run() -> None:
            for start in range(0, N, rows):
                dy_i = dy[start : start + rows]
                dy_i @ B
                h[start : start + rows].T.contiguous() @ dy_i

        return run

    return {f"{rows * D * 4 // 2**10} KiB": in_blocks(rows) for rows in (64, 256, 1024, N)}


def averaging() -> Alternatives:
    """An allocator's averages over 60 weights of 12 x 4096, more than a cache holds."""
    w, g, mean, unc = ([torch.randn(12, 4096) for _ in range(60)] for _ in range(4))

    def streams() -> None:
        for i in range(len(w)):
            w[i].sum()
            g[i].sum()
            mean[i].add_(0.0)
            unc[i].add_(0.0)

    def as_peft() -> None:
        for i in range(len(w)):
            ipt = (w[i] * g[i]).abs().detach()
            mean[i] = 0.85 * mean[i] + 0.15 * ipt
            unc[i] = 0.85 * unc[i] + 0.15 * (ipt - mean[i]).abs()

    return {
        "streams alone": streams,
        "in place": lambda: update_averages(w, g, mean, unc, 0.85, 0.85),
        "as PEFT": as_peft,
    }


def penalising() -> Alternatives:
    """The orthogonal penalty of 30 A and 30 B, forward and backward, onto gradients that are there."""
    rows = [torch.randn(12, 4096, requires_grad=True) for _ in range(30)]
    columns = [torch.randn(4096, 12, requires_grad=True) for _ in range(30)]
    for factor in rows + columns:
        factor.grad = torch.zeros_like(factor)
    push = torch.zeros(12, 12)

    def products() -> None:
        with torch.no_grad():
            for A, B in zip(rows, columns, strict=True):
                A @ A.T, B.T @ B
            for A, B in zip(rows, columns, strict=True):
                A.grad.add_(push @ A)  # type: ignore[union-attr]
                B.grad.add_(B @ push)  # type: ignore[union-attr]

    def as_peft() -> None:
        grams = [G for A, B in zip(rows, columns, strict=True) for G in (A @ A.T, B.T @ B)]
        total = sum(torch.norm(G - torch.eye(12, out=torch.empty_like(G)), p="fro") for G in grams)
        (total / len(grams)).backward()  # type: ignore[union-attr]

    return {
        "products alone": products,
        "one product back": lambda: _mean_distance(rows, columns).backward(),  # type: ignore[no-untyped-call]
        "as PEFT": as_peft,
    }


def applying() -> Alternatives:
    """An autograd function of a few numbers, as torch applies it, and without binding arguments."""
    x = torch.randn(2, 2, requires_grad=True)
    arguments = (x, x, None, None, None, None, None, None, None, None, False)
    bare = super(torch.autograd.Function, Nothing).apply  # type: ignore[misc]
    return {"bound": lambda: Nothing.apply(*arguments), "bare": lambda: bare(*arguments)}


class Nothing(torch.autograd.Function):
    """As many arguments as a layer's function has."""

    @staticmethod
    def forward(
        base: Tensor, B: Tensor, a: None, b: None, c: None, d: None, e: None, f: None, g: None,
        h: None, in_place: bool,
    ) -> Tensor:  # fmt: skip
        return base

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        pass


def drawing() -> Alternatives:
    """A mask of N * D elements."""
    x = torch.randn(N, D).bfloat16()
    size = N * D
    return {
        "dropout(x)": lambda: dropout(x, 0.1),
        "bernoulli_ into bytes": lambda: torch.empty(size, dtype=torch.uint8).bernoulli_(0.9),
        "half a random word each": lambda: half_words(size),
        "a quarter of a random word each": lambda: _dropout._draw(size, 0.1, CPU),
    }


def half_words(size: int) -> Tensor:
    words = torch.randint(-(2**63), 2**63 - 1, (size // 2,))
    return words.view(torch.int32) < round(0.9 * 2**32) - 2**31


def packing() -> Alternatives:
    """Eight bytes of 0 and 1 into one of eight bits, and back."""
    kept = _dropout._draw(N * D, 0.1, CPU)
    mask = _dropout._packed(kept)
    return {
        "pack": lambda: _dropout._packed(kept),
        "unpack": lambda: _dropout.unpacked(mask, N, D),
    }


def masking() -> Alternatives:
    """x times a mask of bytes, bf16 and fp32."""
    x, wide = torch.randn(N, D).bfloat16(), torch.randn(N, D)
    keep = torch.empty(N, D, dtype=torch.int8).bernoulli_(0.9)
    unsigned = keep.view(torch.uint8)
    truth = keep.bool()
    return {
        "x * int8": lambda: x * keep,
        "x * uint8": lambda: x * unsigned,
        "fp32 x * int8": lambda: wide * keep,
        "fp32 x * uint8": lambda: wide * unsigned,
        "fp32 x * bytes.to(fp32)": lambda: wide * keep.to(wide.dtype),
        "x * bytes.to(bf16)": lambda: x * keep.to(x.dtype),
        "x * bool": lambda: x * truth,
        "where": lambda: torch.where(truth, x, 0.0),
        "masked_fill": lambda: x.masked_fill(truth, 0.0),
    }


def plain_operations() -> Alternatives:
    """Forward and backward of the adapter alone: ordinary operations, or the two autograd functions."""
    x, base = torch.randn(N, D).bfloat16(), torch.randn(N, D).bfloat16()
    A, E, B = (torch.randn(*s).requires_grad_(True) for s in ((R, D), (R, 1), (D, R)))
    c, dy = torch.ones(1), torch.randn(N, D).bfloat16()
    adapters = [Adapter(torch.nn.Identity(), A, E, B, 1.0, c)]

    def step(update: Callable[[Tensor, Tensor], Tensor]) -> Callable[[], None]:
        def run() -> None:
            y = update(base.detach().requires_grad_(True), x.detach().requires_grad_(True))
            y.backward(dy)
            A.grad = E.grad = B.grad = None

        return run

    def peft(base: Tensor, x: Tensor) -> Tensor:
        return base + ((x.float() @ (A * E).T @ B.T) * c).to(base.dtype)

    def folded(base: Tensor, x: Tensor) -> Tensor:
        return torch.addmm(base, x @ (A * (E * c)).T.to(x.dtype), B.T.to(x.dtype))

    def widened(base: Tensor, x: Tensor) -> Tensor:
        return torch.addmm(base, (x.float() @ (A * (E * c)).T).to(base.dtype), B.T.to(base.dtype))

    return {
        "fp32 copy of x, as PEFT": step(peft),
        "folded, gradients of A in fp32": step(widened),
        "folded, bf16 products": step(folded),
        "two functions, bf16 products": step(
            lambda b, x: adapted(lambda x: b, x, adapters, is_private=lambda: False)
        ),
    }


def accuracy() -> dict[str, float]:
    """How far the gradient of Q is off, over its norm, where x and dy have been rounded to bf16.

    "rounded x and dy": by that alone, the products being exact.
    """
    x, dy, B = torch.randn(N, D), torch.randn(N, D), torch.randn(D, R)
    exact = gradient(x.double(), dy.double(), B.double())
    x, dy = x.bfloat16(), dy.bfloat16()
    found = {
        "rounded x and dy": gradient(x.double(), dy.double(), B.double()),
        "fp32 products": gradient(x.float(), dy.float(), B),
        "bf16 products": gradient(x, dy, B.bfloat16()),
    }
    return {k: float(f"{(v - exact).norm() / exact.norm():.2g}") for k, v in found.items()}


def gradient(x: Tensor, dy: Tensor, B: Tensor) -> Tensor:
    """dy @ B, transposed, times x."""
    return (B.T @ dy.T) @ x


EXPERIMENTS: Mapping[str, Callable[[], Alternatives]] = {
    "orientation_fp32": lambda: orientation(torch.float32),
    "orientation_bf16": lambda: orientation(torch.bfloat16),
    "ranks": ranks,
    "parts": parts,
    "rounding": rounding,
    "adding_fp32": lambda: adding(torch.float32),
    "adding_bf16": lambda: adding(torch.bfloat16),
    "applying": applying,
    "averaging": averaging,
    "penalising": penalising,
    "one_row": lambda: few_rows(1),
    "sixteen_rows": lambda: few_rows(16),
    "many_rows": lambda: few_rows(N),
    "block_size": block_size,
    "drawing": drawing,
    "packing": packing,
    "masking": masking,
    "plain_operations": plain_operations,
}


def main() -> int:
    names = sys.argv[1:] or list(EXPERIMENTS)
    if unknown := sorted(set(names) - set(EXPERIMENTS)):
        sys.exit(f"No experiment {', '.join(unknown)}: give some of {', '.join(EXPERIMENTS)}.")
    torch.set_num_threads(1)
    found = json.loads(TARGET.read_text(encoding="utf-8"))
    for name in names:
        found[name] = milliseconds(EXPERIMENTS[name]())
    found["accuracy"] = accuracy()
    TARGET.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(TARGET)
    return 0


def milliseconds(steps: Alternatives) -> dict[str, float]:
    """The median of each, in turns."""
    clock = time.process_time
    calls = min(calls_for(step, CPU, clock) for step in steps.values())
    times = interleaved(steps, seconds=5.0, least_rounds=15, device=CPU, calls=calls, clock=clock)
    return {name: float(f"{1e3 * median(taken):.3g}") for name, taken in times.items()}


if __name__ == "__main__":
    sys.exit(main())

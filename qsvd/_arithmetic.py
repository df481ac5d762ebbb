"""The adapter's arithmetic: one pure function of tensors, and its derivative.

    y = base + (x * mask) @ (A * E * c).T @ B.T          c = scaling / (ranknum + 1e-5)

The mask is dropout's, if there is any, and its 1 / (1 - p) stands in `c`. `E` and `c` are folded
into the small `Q = A * (E * c)`, in fp32, so that nothing as large as `x` or `y` is written beside
`y` itself: one `addmm` adds the product to `base`, out of place. Folding also keeps fp16 in range:
the update is never held before it has been divided by `ranknum`.

For the backward pass only `x`, which its producer keeps anyway, the small fp32 factors and the mask
in bits are saved. `h = x @ Q.T` is computed again rather than kept in half precision, and the
gradients of `Q` and `B` are products of fp32 factors accumulated and returned in fp32, whatever the
dtype of `x`: half-precision products would give them to 5e-4, these give them to 4e-7.

Every step is an ordinary differentiable operation, so a second derivative is right as well, or, for
half precision on CUDA, refused by torch.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from qsvd._dropout import unpacked
from qsvd._products import better_wide, expand, times, wide_blocks

Gradients = tuple[Tensor | None, ...]

# With fewer, choosing some of them takes as long as they do.
_MANY_RANKS = 8


def add_adapter(
    base: Tensor,
    x: Tensor,
    A: Tensor,
    E: Tensor,
    B: Tensor,
    c: Tensor,
    mask: Tensor | None = None,
) -> Tensor:
    """`base + (x * mask) @ (A * E * c).T @ B.T`, in the dtype of `base`.

    Args:
        base: (..., out), any floating dtype; it is read, never written.
        x: (..., in), any floating dtype.
        A: (r, in), fp32.
        E: (r, 1), fp32.
        B: (out, r), fp32.
        c: (1,), fp32: scaling / (ranknum + 1e-5), over (1 - p) if there is a mask. It gets no
            gradient.
        mask: the elements of x that dropout keeps, see `draw_mask`; None for all.

    Returns:
        (..., out), a new tensor in `base`'s dtype. With r = 0 it is `base` itself.
    """
    if A.shape[0] == 0:
        return base
    # Without grad mode the bare formula: a Function costs more than the products of one token.
    add = _AddAdapter.apply if torch.is_grad_enabled() else _AddAdapter.forward
    with _without_autocast(x.device):
        y: Tensor = add(_rows(base), _rows(x), A, E, B, c, mask)
    # Reshaped out here: autograd forbids writing in place into a view that a Function returns.
    return y if base.dim() == 2 else y.reshape(base.shape)


class _AddAdapter(torch.autograd.Function):
    """`y = base + x @ Q.T @ B.T` with Q = A * (E * c); base and y (n, out), x (n, in)."""

    @staticmethod
    def forward(
        base: Tensor, x: Tensor, A: Tensor, E: Tensor, B: Tensor, c: Tensor, mask: Tensor | None
    ) -> Tensor:
        if (live := _live_ranks(E, x)) is not None:
            A, E, B = A[live], E[live], B[:, live]
        Q = A * (E * c)  # rank, in
        if mask is not None:
            x = x * unpacked(mask, *x.shape)
        if torch.float16 in (x.dtype, base.dtype) or better_wide(x):
            # fp16: x @ Q.T may leave its range.
            h = _side_by_side([times(Q, block.T) for (block,) in wide_blocks(x)])  # rank, n
        else:
            h = Q.to(x.dtype) @ x.T  # rank, n
        return expand(h, B.T, base.dtype, onto=base)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, x, A, E, B, c, mask = inputs
        trained = any(ctx.needs_input_grad[2:5])
        ctx.x_dtype = x.dtype
        ctx.save_for_backward(x if trained else None, A, E, B, c, mask)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Gradients:
        x, A, E, B, c, mask = ctx.saved_tensors
        needs_base, needs_x, needs_A, needs_E, needs_B = ctx.needs_input_grad[:5]
        needs_Q = needs_A or needs_E
        # Contiguous: B.T as it is would be read at half the speed.
        BT = B.T if better_wide(dy) else B.T.contiguous()
        keep = None if mask is None else unpacked(mask, dy.shape[0], A.shape[1])  # n, in
        rows = [dy]
        if needs_Q or needs_B:
            rows += [x] if keep is None else [x, keep]
        P: list[Tensor] = []
        dx = dQ = dBT = None
        with _without_autocast(dy.device):
            Ec = E * c  # rank, 1
            Q = A * Ec  # rank, in
            # A second derivative needs the products that are zero in the first.
            live = None if torch.is_grad_enabled() else _live_ranks(E, dy)
            if live is not None:
                Q = Q[live]
            for dy_i, *factors in wide_blocks(*rows):
                if needs_x or needs_Q:
                    P_i = times(BT, dy_i.T)  # rank, block; of all ranks, for dE is not zero
                    P.append(P_i if live is None else P_i[live])
                if needs_Q or needs_B:
                    x_i = factors[0] if keep is None else factors[0] * factors[1]  # block, in
                if needs_Q:
                    dQ = _sum(dQ, times(P_i, x_i))  # rank, in
                if needs_B:
                    h_i = times(Q, x_i.T)  # live rank, block
                    dBT = _sum(dBT, times(h_i, dy_i))  # live rank, out
            if needs_x:
                dx = expand(_side_by_side(P), Q, ctx.x_dtype)  # n, in
                if keep is not None:
                    dx.mul_(keep)
            dA = dQ * Ec if dQ is not None and needs_A else None
            dE = (dQ * A).sum(1, keepdim=True) * c if dQ is not None and needs_E else None
            if dBT is not None and live is not None:
                dBT = torch.zeros_like(BT).index_copy_(0, live, dBT)
        dB = None if dBT is None else dBT.T
        return dy if needs_base else None, dx, dA, dE, dB, None, None


def _live_ranks(E: Tensor, rows: Tensor) -> Tensor | None:
    """The ranks that are not masked, where it pays to leave out the others; None for all ranks.

    A masked triplet (E_i = 0) adds nothing to y, dx, dA and dB; dE_i alone need not be zero. Only a
    CPU's values are at hand: a GPU would have to be waited for, and a compiler sees none.
    """
    if E.device.type != "cpu" or E.numel() < _MANY_RANKS or better_wide(rows):
        return None
    if torch.compiler.is_compiling() or type(E) not in (Tensor, nn.Parameter):
        return None
    live = E.detach().flatten().nonzero().flatten()
    return live if 4 * live.numel() <= 3 * E.numel() else None


def _rows(t: Tensor) -> Tensor:
    """(..., k) as (n, k); a leading dimension of size 0 gives n = 0."""
    return t if t.dim() == 2 else t.reshape(t.shape[:-1].numel(), t.shape[-1])


def _side_by_side(blocks: list[Tensor]) -> Tensor:
    return blocks[0] if len(blocks) == 1 else torch.cat(blocks, dim=1)


def _sum(total: Tensor | None, term: Tensor) -> Tensor:
    return term if total is None else total + term


def _without_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """Dtypes are chosen product by product here; autocast would round every factor to half."""
    if device.type == "meta" or not torch.is_autocast_enabled(device.type):
        return nullcontext()
    return torch.autocast(device.type, enabled=False)

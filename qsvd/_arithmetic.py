"""The adapter's arithmetic: one pure function of tensors, and its derivative.

    y = base + (x * mask) @ (A * E * c).T @ B.T          c = scaling / (ranknum + 1e-5)

The mask is dropout's, if there is any, and its 1 / (1 - p) stands in `c`. `E` and `c` are folded
into the small `Q = A * (E * c)`, in fp32, so that nothing as large as `x` or `y` is written beside
`y` itself: one `addmm` adds the product to `base`, out of place. Folding also keeps fp16 in range:
the update is never held before it has been divided by `ranknum`.

Products with a large tensor are computed in its dtype, see `qsvd._products`, their sums in fp32, and
the parameters' gradients come out in fp32. For the backward pass `x` is saved, which its producer
keeps anyway, the small fp32 factors, the mask in bits, and `h = x @ Q.T` where it is small beside x;
otherwise it is computed again.

Every step is an ordinary differentiable operation, so a second derivative is right as well, or, for
half precision on CUDA, refused by torch.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from qsvd._dropout import Mask, unpacked
from qsvd._products import HALF, expand, few_rows, steps, times, widened

Gradients = tuple[Tensor | None, ...]

# With fewer, choosing some of them takes as long as they do.
_MANY_RANKS = 8
# In half precision h is kept if it takes at most this share of x's bytes.
_KEPT_SHARE = 1 / 25


def add_adapter(
    base: Tensor,
    x: Tensor,
    A: Tensor,
    E: Tensor,
    B: Tensor,
    c: Tensor | float,
    mask: Mask | None = None,
) -> Tensor:
    """`base + (x * mask) @ (A * E * c).T @ B.T`, in the dtype of `base`.

    Args:
        base: (..., out), any floating dtype; it is read, never written.
        x: (..., in), any floating dtype.
        A: (r, in), fp32.
        E: (r, 1), fp32.
        B: (out, r), fp32.
        c: a number, or (1,), fp32: scaling / (ranknum + 1e-5), over (1 - p) if there is a mask. It
            gets no gradient.
        mask: the elements of x that dropout keeps, see `draw_mask`; None for all.

    Returns:
        (..., out), a new tensor in `base`'s dtype. With r = 0 it is `base` itself.
    """
    if A.shape[0] == 0:
        return base
    grad = torch.is_grad_enabled()
    # Without grad mode the bare formula: a Function costs more than the products of a few rows.
    if not (grad or mask or torch.is_autocast_enabled("cpu")) and x.dim() > 1 and few_rows(x):
        return _add_to_few_rows(base, x, A, E, B, c)[0]
    add = _AddAdapter.apply if grad else _AddAdapter.forward
    with _without_autocast(x.device):
        y: Tensor = add(_rows(base), _rows(x), A, E, B, c, *(mask or (None, None)))[0]
    # Reshaped out here: autograd forbids writing in place into a view that a Function returns.
    return y if base.dim() == 2 else y.reshape(base.shape)


def number(t: Tensor, device: torch.device) -> Tensor | float:
    """A scalar, from a tensor of one element: a float if that is at hand, or a tensor on the device.

    What is done with a float is no operation of torch's: with few rows, each of those counts.
    """
    return t.item() if _at_hand(t) else t.detach().to(device)


class _AddAdapter(torch.autograd.Function):
    """`y = base + (x * kept) @ Q.T @ B.T`, and h; base and y (n, out), x (n, in)."""

    @staticmethod
    def forward(
        base: Tensor,
        x: Tensor,
        A: Tensor,
        E: Tensor,
        B: Tensor,
        c: Tensor | float,
        kept: Tensor | None,
        bits: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        if kept is not None:
            x = x * kept.to(x.dtype)
        if few_rows(x):
            y, hT, rest = _add_to_few_rows(base, x, A, E, B, c)
            return y, hT.T * rest
        if (live := _live_ranks(E, x)) is not None:
            A, E, B = A[live], E[live], B[:, live]
        Q = A * (E * c)  # rank, in
        h = _side_by_side([times(Q, widened(x[at]).T) for at in steps(x)])  # rank, n
        return expand(h, B.T, base.dtype, onto=base), h

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        _, x, A, E, B, c, _, bits = inputs
        _, h = output
        ctx.mark_non_differentiable(h)
        trained = any(ctx.needs_input_grad[2:5])
        saved_h = h if ctx.needs_input_grad[4] and _is_kept(h, x) else None
        ctx.x_dtype = x.dtype
        ctx.c = c if isinstance(c, float) else None
        saved_c = None if isinstance(c, float) else c
        ctx.save_for_backward(x if trained else None, A, E, B, saved_c, bits, saved_h)

    @staticmethod
    def backward(ctx: Any, dy: Tensor, _: Tensor) -> Gradients:
        x, A, E, B, c, bits, h = ctx.saved_tensors
        c = ctx.c if c is None else c
        needs_base, needs_x, needs_A, needs_E, needs_B = ctx.needs_input_grad[:5]
        needs_Q = needs_A or needs_E
        # A second derivative needs h as a function of x, and the products that are zero in the first.
        again = torch.is_grad_enabled()
        # Contiguous: B.T as it is would be read at half the speed, but in bf16.
        BT = B.T if few_rows(dy) or dy.dtype == torch.bfloat16 else B.T.contiguous()
        kept = None
        if bits is not None:
            kept = unpacked(bits, dy.shape[0], A.shape[1]).to(ctx.x_dtype)  # n, in
        if again:
            h = None
        P: list[Tensor] = []
        dx = dQ = dBT = None
        with _without_autocast(dy.device):
            Ec = E * c  # rank, 1
            Q = A * Ec  # rank, in
            live = None if again else _live_ranks(E, dy)
            if live is not None:
                Q = Q[live]
            if h is not None and len(h) != len(Q):
                h = None  # of live ranks, and a compiler that has backward alone looks for none
            reads_x = needs_Q or (needs_B and h is None)
            for at in steps(dy, x) if reads_x else steps(dy):
                dy_i = widened(dy[at])  # block, out
                if needs_x or needs_Q:
                    P_i = times(BT, dy_i.T)  # rank, block; of all ranks, for dE is not zero
                    P.append(P_i if live is None else P_i[live])
                if reads_x:
                    x_i = widened(x[at])  # block, in
                    if kept is not None:
                        x_i = x_i * kept[at]
                if needs_Q:
                    dQ = _sum(dQ, times(P_i, x_i))  # rank, in
                if needs_B:
                    h_i = times(Q, x_i.T) if h is None else h[:, at]  # live rank, block
                    dBT = _sum(dBT, times(h_i, dy_i))  # live rank, out
            if needs_x:
                dx = expand(_side_by_side(P), Q, ctx.x_dtype)  # n, in
                if kept is not None:
                    dx.mul_(kept)
            dA = dQ * Ec if dQ is not None and needs_A else None
            dE = (dQ * A).sum(1, keepdim=True) * c if dQ is not None and needs_E else None
            if dBT is not None and live is not None:
                dBT = torch.zeros_like(BT, dtype=dBT.dtype).index_copy_(0, live, dBT)
        dB = None
        if dBT is not None:
            # As B is laid out, or it would be copied once more where it is accumulated.
            dB = dBT.T.to(B.dtype, memory_format=torch.contiguous_format)
        return dy if needs_base else None, dx, dA, dE, dB, None, None, None


def _add_to_few_rows(
    base: Tensor, x: Tensor, A: Tensor, E: Tensor, B: Tensor, c: Tensor | float
) -> tuple[Tensor, Tensor, float]:
    """y (..., out) of few rows on a CPU; a part of h (..., rank), fp32, and what h is times that.

    In as few operations as can be: each takes longer to start than to multiply so few rows.
    """
    if isinstance(c, Tensor):
        E, c = E * c, 1.0
    part = linear(x if x.dtype == A.dtype else x.to(A.dtype), A).mul_(E.flatten())
    update = linear(part, B)
    if update.dtype == base.dtype:
        y = torch.add(base, update, alpha=c)
    else:
        y = torch.add(base, update, alpha=c, out=torch.empty_like(base))
    return y, part, c


def _is_kept(h: Tensor, x: Tensor) -> bool:
    """Whether h is saved for the backward pass beside x."""
    if x.dtype not in HALF:
        return True
    # A compiler decides for itself what it computes again; and sizes may be symbols to it.
    return not torch.compiler.is_compiling() and h.nbytes <= _KEPT_SHARE * x.nbytes


def _live_ranks(E: Tensor, rows: Tensor) -> Tensor | None:
    """The ranks that are not masked, where it pays to leave out the others; None for all ranks.

    A masked triplet (E_i = 0) adds nothing to y, dx, dA and dB; dE_i alone need not be zero.
    """
    if E.numel() < _MANY_RANKS or few_rows(rows) or not _at_hand(E):
        return None
    # A list: three small operations would take longer.
    live = [i for i, (value,) in enumerate(E.tolist()) if value != 0.0]
    return torch.tensor(live, dtype=torch.int64) if 4 * len(live) <= 3 * len(E) else None


def _at_hand(t: Tensor) -> bool:
    """Whether values can be looked at: a GPU would have to be waited for, a compiler sees none."""
    if t.device.type != "cpu" or torch.compiler.is_compiling():
        return False
    return type(t) in (Tensor, nn.Parameter) and not torch._C._are_functorch_transforms_active()


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

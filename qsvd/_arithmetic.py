"""The adapter's arithmetic: pure functions of tensors, and their derivative.

    y = base(x) + (x * mask) @ (A * E * c).T @ B.T          c = scaling / (ranknum + 1e-5)

The mask is dropout's, if there is any, and its 1 / (1 - p) stands in `c`. `E` and `c` are folded
into the small `Q = A * (E * c)`, in fp32, so that the update is never held before it has been divided
by `ranknum`, which keeps fp16 in range.

An adapter begins before the base layer and finishes after it: in between the base layer is given what
the adapter passes on. So in backward the gradient that the base layer has for x comes back to the
adapter, and both sums, y and dx, are one product each that is added to what the base layer wrote.
Nothing as large as x or y is allocated where that may be written (see `adapted`).

Products with a large tensor are computed in its dtype, or in bf16 if autocast makes that of it, see
`qsvd._products`, their sums in fp32, and the parameters' gradients come out in fp32. For the backward
pass `x` is saved, which its producer keeps anyway, the small fp32 factors, the mask in bits, and
`h = x @ Q.T` where it is small beside x; otherwise it is computed again. Few rows are left to ordinary
operations in fp32.

Every step is an ordinary differentiable operation, so a second derivative is right as well, or, for
half precision on CUDA, refused by torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from qsvd._autograd import apply, is_eager
from qsvd._dropout import Mask, drop, unpacked
from qsvd._products import HALF, expand, few_rows, gather, shrink

Gradients = tuple[Tensor | None, ...]

# With fewer, choosing some of them takes as long as they do.
_MANY_RANKS = 8
# In half precision h is kept if it takes at most this share of x's bytes.
_KEPT_SHARE = 1 / 25


class Adapter(NamedTuple):
    """What a layer has of one adapter.

    dropout: called with x (..., in), or drawn as a mask: see `qsvd._dropout`.
    A: (r, in), fp32.
    E: (r, 1), fp32.
    B: (out, r), fp32.
    scaling: the numerator of c.
    ranknum: a number, or (1,), fp32. It gets no gradient.
    """

    dropout: nn.Module
    A: Tensor
    E: Tensor
    B: Tensor
    scaling: float
    ranknum: Tensor | float


class _Pending(NamedTuple):
    """An update that waits for the base layer's output.

    h: (n, rank), x @ Q.T of the ranks that are computed.
    token: (n, rank), what h is in the graph of the backward pass. It has no values.
    bits: dropout's mask, None if all of x is kept.
    live: the ranks that are computed, None for all.
    as_bf16: whether fp32 x and dy are rounded to bf16 before they are multiplied.
    """

    x: Tensor
    A: Tensor
    E: Tensor
    B: Tensor
    c: Tensor | float
    h: Tensor
    token: Tensor
    bits: Tensor | None
    live: Tensor | None
    as_bf16: bool


def adapted(
    call_base: Callable[[Tensor], Tensor],
    x: Tensor,
    adapters: Iterable[Adapter],
    is_private: Callable[[], bool],
    drop: Callable[[nn.Module, Tensor], tuple[Tensor, Mask | None]] = drop,
) -> Tensor:
    """The base layer's output plus the updates of some adapters.

    Args:
        call_base: the base layer.
        x: (..., in), any floating dtype.
        adapters: in the order in which they are added.
        is_private: whether nobody else sees how the base layer is called, what it returns and the
            gradient that it returns for its input. Then both are written, and x is given as a matrix.
        drop: what an adapter's dropout makes of x.

    Returns:
        (..., out), in the dtype that the base layer returns.
    """
    adapters = [adapter for adapter in adapters if adapter.A.shape[0] > 0]
    if few_rows(x):
        return _few_rows_adapted(call_base, x, adapters, drop)
    shape = x.shape
    private = is_private()
    if private:
        x = _rows(x)
    own_dtypes, as_bf16 = _without_autocast(x), _rounds_to_bf16(x)
    pending = []
    for adapter in adapters:
        x_a, mask = drop(adapter.dropout, x)
        with own_dtypes:
            passed, update = _begin(x_a, adapter, mask, as_bf16, private)
        x = passed if x_a is x else x
        pending.append(update)
    y = call_base(x)
    with own_dtypes:
        for update in pending:
            y = _finish(y, update, private)
    # Reshaped out here: autograd forbids writing in place into a view that a Function returns.
    return y if y.dim() == len(shape) else y.reshape(*shape[:-1], y.shape[-1])


def _begin(
    x: Tensor, adapter: Adapter, mask: Mask | None, as_bf16: bool, in_place: bool
) -> tuple[Tensor, _Pending]:
    """What to call the base layer with, x's values, and what is to be finished."""
    _, A, E, B, *_ = adapter
    c = _factor(adapter, mask)
    rows = _rows(x)
    live = _live_ranks(E)
    kept, bits = (None, None) if mask is None else (mask.kept, mask.bits)
    passed, token, h = apply(_Project, rows, A, E, c, kept, bits, live, as_bf16, in_place)
    if torch.is_grad_enabled() and x.requires_grad:
        x = passed if x.dim() == 2 else passed.reshape(x.shape)
    return x, _Pending(rows, A, E, B, c, h, token, bits, live, as_bf16)


def _finish(base: Tensor, pending: _Pending, in_place: bool) -> Tensor:
    """`base` (..., out) plus the update, (n, out): new, or `base` if that may be written."""
    x, A, E, B, c, h, token, bits, live, as_bf16 = pending
    rows = _rows(base)
    # A view of what a function returned is not to be written within another.
    in_place = in_place and not rows._is_view()
    y: Tensor = apply(_Update, rows, token, h, B, x, A, E, c, bits, live, as_bf16, in_place)
    return y


def _factor(adapter: Adapter, mask: Mask | None) -> Tensor | float:
    """c, and dropout's 1 / (1 - p)."""
    scaling = adapter.scaling if mask is None else adapter.scaling / (1.0 - mask.p)
    return scaling / (adapter.ranknum + 1e-5)


def number(t: Tensor, device: torch.device) -> Tensor | float:
    """A scalar, from a tensor of one element: a float if that is at hand, or a tensor on the device.

    What is done with a float is no operation of torch's: with few rows, each of those counts.
    """
    return t.item() if _at_hand(t) else t.detach().to(device)


class _Project(torch.autograd.Function):
    """x for the base layer, a token for h in the graph, and h = (x * kept) @ Q.T, for x (n, in).

    In backward the token's gradient is P = dy @ B, and what comes back for x is the base layer's.
    """

    @staticmethod
    def forward(
        x: Tensor,
        A: Tensor,
        E: Tensor,
        c: Tensor | float,
        kept: Tensor | None,
        bits: Tensor | None,
        live: Tensor | None,
        as_bf16: bool,
        in_place: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        h = _hidden(_as_multiplied(x, as_bf16), A, E, c, live, kept)
        return x.view_as(x), h.new_empty(()).expand(x.shape[0], A.shape[0]), h

    @staticmethod
    def setup_context(
        ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]
    ) -> None:
        x, A, E, c, _, bits, live, as_bf16, in_place = inputs
        ctx.mark_non_differentiable(output[2])
        ctx.set_materialize_grads(False)
        ctx.x_dtype, ctx.as_bf16, ctx.in_place, ctx.live = x.dtype, as_bf16, in_place, live
        trained = ctx.needs_input_grad[1] or ctx.needs_input_grad[2]
        ctx.c, saved_c = _apart(c)
        ctx.save_for_backward(x if trained else None, A, E, saved_c, bits)

    @staticmethod
    def backward(ctx: Any, dx: Tensor | None, P: Tensor | None, _: None) -> Gradients:
        if P is None:
            return dx, *(None,) * 8
        x, A, E, saved_c, bits = ctx.saved_tensors
        c = ctx.c if saved_c is None else saved_c
        needs_x, needs_A, needs_E = ctx.needs_input_grad[:3]
        # A second derivative needs the products that are zero in the first, and what it reads unwritten.
        again = torch.is_grad_enabled()
        live = None if again else ctx.live
        kept = None if bits is None else unpacked(bits, P.shape[0], A.shape[1])
        dA = dE = None
        with _without_autocast(P):
            Ec = E * c  # rank, 1
            if needs_A or needs_E:
                # rank, in; of all ranks, for dE is not zero
                dQ = gather(P, _as_multiplied(x, ctx.as_bf16), kept)
                dA = dQ * Ec if needs_A else None
                dE = (dQ * A).sum(1, keepdim=True) * c if needs_E else None
            if needs_x:
                Q = A * Ec  # rank, in
                if live is not None:
                    P, Q = P[:, live], Q[live]
                in_place = ctx.in_place and not again and is_eager()
                in_place = in_place and dx is not None and dx.is_contiguous()
                dx = expand(P, Q, ctx.x_dtype, dx, in_place, kept)
        return dx, dA, dE, *(None,) * 6


class _Update(torch.autograd.Function):
    """y = base + h @ B.T, for base (n, out): the products for x, A, E are left to `_Project`."""

    @staticmethod
    def forward(
        base: Tensor,
        token: Tensor,
        h: Tensor,
        B: Tensor,
        x: Tensor,
        A: Tensor,
        E: Tensor,
        c: Tensor | float,
        bits: Tensor | None,
        live: Tensor | None,
        as_bf16: bool,
        in_place: bool,
    ) -> Tensor:
        BT = B.T if live is None else B.T[live]
        return expand(h, BT, base.dtype, base, in_place)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        base, _, h, B, x, A, E, c, bits, ctx.live, ctx.as_bf16, in_place = inputs
        if in_place:
            ctx.mark_dirty(base)
        ctx.c, saved_c = _apart(c)
        factors: Gradients = (None,) * 6
        if ctx.needs_input_grad[3]:
            saved_h = h if bits is not None or _is_kept(h, x) else None
            factors = saved_h, x, A, E, saved_c, bits
        ctx.save_for_backward(B, *factors)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Gradients:
        B, h, x, A, E, saved_c, bits = ctx.saved_tensors
        c = ctx.c if saved_c is None else saved_c
        needs_base, needs_token, _, needs_B = ctx.needs_input_grad[:4]
        # A second derivative needs h as a function of x, and the products that are zero in the first.
        again = torch.is_grad_enabled()
        live = None if again else ctx.live
        P = dB = None
        with _without_autocast(dy):
            G = _as_multiplied(dy, ctx.as_bf16)  # n, out
            if needs_token:
                P = shrink(G, B.T)  # n, rank
            if needs_B:
                if h is None or again:
                    kept = None if bits is None else unpacked(bits, *x.shape)
                    h = _hidden(_as_multiplied(x, ctx.as_bf16), A, E, c, live, kept)  # n, live rank
                dBT = gather(h, G)  # live rank, out
                if live is not None:
                    dBT = dBT.new_zeros(B.T.shape).index_copy_(0, live, dBT)
                # As B is laid out, or it would be copied once more where it is accumulated.
                dB = dBT.T.to(B.dtype, memory_format=torch.contiguous_format)
        return dy if needs_base else None, P, None, dB, *(None,) * 8


def _hidden(
    x: Tensor,
    A: Tensor,
    E: Tensor,
    c: Tensor | float,
    live: Tensor | None,
    kept: Tensor | None = None,
) -> Tensor:
    """h = (x * kept) @ Q.T, (n, rank), of the live ranks."""
    if live is not None:
        A, E = A[live], E[live]
    return shrink(x, A * (E * c), kept)


def _as_multiplied(t: Tensor, as_bf16: bool) -> Tensor:
    """What of x or dy is multiplied."""
    return t.bfloat16() if as_bf16 and t.dtype == torch.float32 else t


def _few_rows_adapted(
    call_base: Callable[[Tensor], Tensor],
    x: Tensor,
    adapters: list[Adapter],
    drop: Callable[[nn.Module, Tensor], tuple[Tensor, Mask | None]],
) -> Tensor:
    """What `adapted` returns for few rows, in as few operations as can be, each left to torch.

    What can be done before the base layer is called, is: that pushes all else out of the caches.
    """
    dropped = []
    for adapter in adapters:
        x_a, mask = drop(adapter.dropout, x)
        dropped.append((adapter, _factor(adapter, mask), x_a, mask))
    own_dtypes = _without_autocast(x)
    y = call_base(x)
    with own_dtypes:
        return _few_rows_added(y, dropped)


def _few_rows_added(
    base: Tensor, dropped: list[tuple[Adapter, Tensor | float, Tensor, Mask | None]]
) -> Tensor:
    """`base` (..., out) plus the updates: summed in the parameters' dtype, and then rounded once."""
    y, one = base, base.numel() == base.shape[-1]
    for (_, A, E, B, *_), c, x, mask in dropped:
        if isinstance(c, Tensor):
            E, c = E * c, 1.0
        x = x if x.dtype == A.dtype else x.to(A.dtype)
        if mask is not None:
            x = x * mask.kept.view(x.shape)
        h, E = linear(x, A), E.flatten()
        h = h * E if torch.is_grad_enabled() else h.mul_(E)
        y = y if y.dtype == B.dtype else y.to(B.dtype)
        # On two threads one operation takes a third of the two's time; for one row its views are more.
        y = (
            torch.add(y, linear(h, B), alpha=c)
            if one
            else torch.addmm(_rows(y), _rows(h), B.T, alpha=c)
        )
    y = y if y.dtype == base.dtype else y.to(base.dtype)
    return y if y.dim() == base.dim() else y.reshape(base.shape)


def _apart(c: Tensor | float) -> tuple[float | None, Tensor | None]:
    """c as a number, and as a tensor, one of which is None."""
    return (None, c) if isinstance(c, Tensor) else (c, None)


def _is_kept(h: Tensor, x: Tensor) -> bool:
    """Whether h is saved for the backward pass beside x."""
    if x.dtype not in HALF:
        return True
    # A compiler decides for itself what it computes again; and sizes may be symbols to it.
    return not torch.compiler.is_compiling() and h.nbytes <= _KEPT_SHARE * x.nbytes


def _live_ranks(E: Tensor) -> Tensor | None:
    """The ranks that are not masked, where it pays to leave out the others; None for all ranks.

    A masked triplet (E_i = 0) adds nothing to y, dx, dA and dB; dE_i alone need not be zero.
    """
    if E.numel() < _MANY_RANKS or not _at_hand(E):
        return None
    # A list: three small operations would take longer.
    live = [i for i, (value,) in enumerate(E.tolist()) if value != 0.0]
    return torch.tensor(live, dtype=torch.int64) if 4 * len(live) <= 3 * len(E) else None


def _at_hand(t: Tensor) -> bool:
    """Whether values can be looked at: a GPU would have to be waited for, a compiler sees none."""
    return t.is_cpu and type(t) in (Tensor, nn.Parameter) and is_eager()


def _rows(t: Tensor) -> Tensor:
    """(..., k) as (n, k); a leading dimension of size 0 gives n = 0."""
    return t if t.dim() == 2 else t.reshape(t.shape[:-1].numel(), t.shape[-1])


def _without_autocast(t: Tensor) -> AbstractContextManager[Any]:
    """Dtypes are chosen product by product here; autocast would round every factor to half."""
    return torch.autocast(_device_type(t), enabled=False) if _in_autocast(t) else nullcontext()


def _rounds_to_bf16(x: Tensor) -> bool:
    """Whether autocast rounds fp32 x to bf16 wherever it is multiplied, as in the base layer.

    Not asked to round to fp16, whose range x and dy may leave.
    """
    if x.dtype != torch.float32 or not _in_autocast(x):
        return False
    return torch.get_autocast_dtype(_device_type(x)) == torch.bfloat16


def _in_autocast(t: Tensor) -> bool:
    kind = _device_type(t)
    return kind != "meta" and torch.is_autocast_enabled(kind)


def _device_type(t: Tensor) -> str:
    # A device makes a new string at every question: as much as an operation of few rows takes.
    return "cpu" if t.is_cpu else t.device.type

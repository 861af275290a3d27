"""The ``cpu`` backend: the fused C++ kernels of csrc/cpu under the layer contract.

The kernels walk through the sequence; the sums over all rows that follow a backward
walk (eq. 9) are plain matrix products, the library's own or torch's, whichever is faster.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from . import native
from .contract import (
    Curvature,
    Gradients,
    OutputGradients,
    Outputs,
    Requested,
    Reserve,
    Tangents,
    Weights,
    by_kind,
    state_dtype,
)
from .steps import entered

if TYPE_CHECKING:
    from .backends import Call

_DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)

missing = native.missing


def unsupported(call: Call) -> str | None:
    """Only the device and the dtype matter to these kernels."""
    if not call.x.is_cpu:
        return f"it runs on cpu tensors, got one on {call.x.device}"
    if call.x.dtype not in _DTYPES:
        return f"it takes {', '.join(map(str, _DTYPES))}, got {call.x.dtype}"
    return None


def layer_forward(
    x: Tensor,
    batch_sizes: Tensor,
    h0: Tensor,
    c0: Tensor,
    weights: Sequence[Weights],
    reset: Tensor | None,
    need_reserve: bool,
    need_cells: bool,
) -> Outputs:
    """One layer; shapes as in ``contract.Outputs``."""
    y, c_all, h_n, c_n, gates, m = torch.ops.fastlstm_C.cpu_forward.default(
        x,
        batch_sizes,
        h0,
        c0,
        *by_kind(weights),
        reset,
        need_reserve,
        need_cells,
    )
    # The library returns what was not asked for as an empty vector.
    return Outputs(
        y,
        c_all if need_reserve or need_cells else None,
        h_n,
        c_n,
        gates if need_reserve else None,
        m if need_reserve and weights[0].w_hr is not None else None,
    )


def plain_forward(
    x: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    weights: Sequence[Tensor],
    reset: Tensor | None,
    directions: int,
    biased: bool,
    hidden_size: int,
    output_size: int,
    changeable: bool,
    need_reserve: bool,
) -> list[Tensor]:
    """All layers of a plain call: y (T, B, D*P), h_n (L*D, B, P), c_n (L*D, B, H).

    ``x (T, B, I)``; ``h0`` and ``c0`` shaped as h_n and c_n, or None for zeros; ``weights`` as
    ``nn.LSTM`` holds them, layer by layer and direction by direction; a step of ``LSTMCell`` comes
    without T, its states as (B, P) and (B, H).  ``reset`` (N,) as in ``layer_forward``.  With
    ``need_reserve``, for a single layer, also y again, c_all, gates and, with a projection, m; the
    first y is a copy, if it is to be ``changeable``.  Empty where anything does not fit.
    """
    return torch.ops.fastlstm_C.cpu_plain_forward.default(
        x,
        h0,
        c0,
        weights,
        reset,
        directions,
        biased,
        hidden_size,
        output_size,
        changeable,
        need_reserve,
    )


def plain_backward(
    grads: Sequence[Tensor | None],
    x: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    weights: Sequence[Tensor],
    reset: Tensor | None,
    reserve: Sequence[Tensor],
    directions: int,
    biased: bool,
    hidden_size: int,
    output_size: int,
    need: Sequence[bool],
) -> list[Tensor]:
    """Gradients of x, h0, c0 and each of ``weights``, from those of y, h_n and c_n.

    The other arguments as of ``plain_forward``; ``reserve`` is what it added; ``need`` as
    ``Requested``.  What is not asked for comes as an empty vector.
    """
    return torch.ops.fastlstm_C.cpu_plain_backward.default(
        *grads,
        x,
        h0,
        c0,
        weights,
        reset,
        reserve,
        directions,
        biased,
        hidden_size,
        output_size,
        need,
        _CHUNK_ROWS,
        _CHUNK_BYTES,
    )


def layer_recompute(
    x: Tensor,
    batch_sizes: Tensor,
    h0: Tensor,
    c0: Tensor,
    weights: Sequence[Weights],
    reset: Tensor | None,
    y: Tensor,
) -> Reserve:
    """One direction's reserve from its output; see ``reference.layer_recompute``."""
    (w,) = weights
    state = state_dtype(x.dtype)
    h_in = entered(0, y, h0[0], batch_sizes, reset)
    w_ih, w_hh = w.w_ih.to(state).T, w.w_hh.to(state).T
    if w.bias is None:
        pre = torch.mm(x.to(state), w_ih)
    else:
        pre = torch.addmm(w.bias.to(state), x.to(state), w_ih)
    pre.addmm_(h_in.to(state), w_hh)
    c_all, gates, m = torch.ops.fastlstm_C.cpu_recompute.default(
        pre, batch_sizes, c0, reset, w.w_hr is not None
    )
    gates = pre if state == x.dtype else gates  # the library has overwritten pre with them
    return Reserve(y, c_all, gates.unsqueeze(1), None if w.w_hr is None else m)


def layer_backward(
    grads: OutputGradients,
    x: Tensor,
    batch_sizes: Tensor,
    h0: Tensor,
    c0: Tensor,
    weights: Sequence[Weights],
    reset: Tensor | None,
    saved: Reserve,
    need: Requested,
) -> Gradients:
    """Gradients of the inputs asked for.

    The walk and the products take turns, chunk by chunk: dgates are as large as all that the
    forward pass saved, and a chunk of them is still in the cache when it is multiplied.
    """
    w_ih, w_hh, _, w_hr = by_kind(weights)
    dx, dh0, dc0, dw_ih, dw_hh, dbias, dw_hr = torch.ops.fastlstm_C.cpu_backward.default(
        *grads,
        x,
        batch_sizes,
        h0,
        c0,
        w_ih,
        w_hh,
        w_hr,
        reset,
        *saved,
        need,
        _CHUNK_ROWS,
        _CHUNK_BYTES,
    )
    return Gradients(
        dx if need.x else None,
        dh0 if need.h0 else None,
        dc0 if need.c0 else None,
        dw_ih or None,
        dw_hh or None,
        dbias or None,
        dw_hr or None,
    )


def layer_walk(
    grads: OutputGradients,
    batch_sizes: Tensor,
    c0: Tensor,
    weights: Sequence[Weights],
    reset: Tensor | None,
    saved: Reserve,
    need: Requested,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """The walk of a backward pass, without the products: da (N, D, 4H) in state dtype; dh_all
    (N, D*P) in state dtype where w_hr's gradient is asked for; dh0 and dc0 where they are."""
    _, w_hh, _, w_hr = by_kind(weights)
    asked = (need.w_hr, need.h0, need.c0)
    da, *rest = torch.ops.fastlstm_C.cpu_walk.default(
        *grads, batch_sizes, c0, w_hh, w_hr, reset, saved.c_all, saved.gates, asked
    )
    dh_all, dh0, dc0 = (t if a else None for t, a in zip(rest, asked, strict=True))
    return da, dh_all, dh0, dc0


def layer_tangent(
    pre: Tensor,
    batch_sizes: Tensor,
    h0_tangent: Tensor,
    c0_tangent: Tensor,
    weights: Sequence[Weights],
    reset: Tensor | None,
    c0: Tensor,
    saved: Reserve,
) -> Tangents:
    """The walk of a layer's tangents; see ``reference.layer_tangent``."""
    _, w_hh, _, w_hr = by_kind(weights)
    y, c_all, h_n, c_n, m = torch.ops.fastlstm_C.cpu_tangent.default(
        pre,
        batch_sizes,
        h0_tangent,
        c0_tangent,
        w_hh,
        w_hr,
        reset,
        c0,
        saved.c_all,
        saved.gates,
    )
    return Tangents(y, c_all, h_n, c_n, m if w_hr else None)


def layer_curvature(
    grads: OutputGradients,
    dm: Tensor,
    batch_sizes: Tensor,
    c0: Tensor,
    reset: Tensor | None,
    saved: Reserve,
    c0_tangent: Tensor,
    pre: Tensor,
    c_tangents: Tensor,
    m: Tensor | None,
) -> Curvature:
    """See ``reference.layer_curvature``."""
    return Curvature(
        *torch.ops.fastlstm_C.cpu_curvature.default(
            batch_sizes, reset, c0, saved.c_all, saved.gates, c0_tangent, c_tangents, pre,
            dm, grads.c_all, grads.c_n, m,
        )
    )  # fmt: skip


# A chunk's dgates are about this large, if that is rows enough for the products to be efficient.
_CHUNK_BYTES = 8 << 20
_CHUNK_ROWS = 1024

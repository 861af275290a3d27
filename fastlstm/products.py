"""The matrix products that follow a backward walk, shared by the kernels' backends.

After the walk every dgate is known, so what is left (eq. 9) is one product over all
rows for each gradient asked for, in state dtype and in a fixed order.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .contract import Gradients, Requested, Reserve, Weights


def input_gradients(
    da: Tensor,
    dh_all: Tensor | None,
    dbias: Tensor | None,
    dh0: Tensor | None,
    dc0: Tensor | None,
    x: Tensor,
    batch_sizes: Tensor,
    h0: Tensor,
    weights: Sequence[Weights],
    reset: Tensor | None,
    saved: Reserve,
    need: Requested,
) -> Gradients:
    """Gradients of a layer's inputs from its dgates.

    Args:
        da: (N, D, 4H) in state dtype, gradients of the pre-activations.
        dh_all: (N, D*P) in state dtype, gradients of every h_t; needed for w_hr only.
        dbias (D, 4H) in state dtype, dh0, dc0: finished by the walk, or None.
    """
    storage, state = x.dtype, da.dtype
    directions = range(len(weights))

    def each(asked: bool, gradient: Callable[[int], Tensor]) -> list[Tensor] | None:
        return [gradient(d).to(storage) for d in directions] if asked else None

    rows = x.to(state) if need.w_ih else x
    dx = None
    if need.x:
        dx = da[:, 0] @ weights[0].w_ih.to(state)
        if len(weights) == 2:
            dx = dx.addmm_(da[:, 1], weights[1].w_ih.to(state))
        dx = dx.to(storage)

    def dw_hr(d: int) -> Tensor:
        output_size, hidden_size = h0.size(-1), da.size(-1) // 4
        if dh_all is None or saved.m is None:
            raise ValueError("dh_all, saved.m: got None, needed for the gradient of w_hr")
        dh = dh_all[:, d * output_size : (d + 1) * output_size]
        return dh.T @ saved.m[:, d * hidden_size : (d + 1) * hidden_size].to(state)

    return Gradients(
        x=dx,
        h0=dh0 if need.h0 else None,
        c0=dc0 if need.c0 else None,
        w_ih=each(need.w_ih, lambda d: da[:, d].T @ rows),
        w_hh=each(need.w_hh, lambda d: _dw_hh(d, da[:, d], batch_sizes, h0[d], reset, saved.y)),
        # Clones: gradients must not share memory.
        bias=None if dbias is None else each(need.bias, lambda d: dbias[d].clone()),
        w_hr=each(need.w_hr, dw_hr),
    )


def _dw_hh(
    d: int, da: Tensor, batch_sizes: Tensor, h0: Tensor, reset: Tensor | None, y: Tensor
) -> Tensor:
    """sum over rows of da_t h_{t-1}^T, (4H, P), for direction ``d``."""
    output_size, rows, batch = h0.size(-1), y.size(0), h0.size(0)
    y = y[:, d * output_size : (d + 1) * output_size]
    if rows == 0:
        return da.new_zeros(da.size(-1), output_size)
    if reset is None and batch_sizes.numel() * batch == rows:
        # Equal sizes: h_{t-1} is y moved by one step, and only its edge comes from h0.
        now, before, edge = (
            (slice(batch, None), slice(None, rows - batch), slice(None, batch))
            if d == 0
            else (slice(None, rows - batch), slice(batch, None), slice(rows - batch, None))
        )
        product = da[edge].T @ h0.to(da.dtype)
        return product.addmm_(da[now].T, y[before].to(da.dtype))
    return da.T @ _previous_h(d, batch_sizes, h0, reset, y).to(da.dtype)


def _previous_h(d: int, batch_sizes: Tensor, h0: Tensor, reset: Tensor | None, y: Tensor) -> Tensor:
    """The h that entered each row's step, (N, P): from y, from h0, or zero at a reset."""
    rows = y.size(0)
    starts = torch.zeros(batch_sizes.numel() + 1, dtype=torch.int64)
    torch.cumsum(batch_sizes, 0, out=starts[1:])
    step = torch.repeat_interleave(torch.arange(batch_sizes.numel()), batch_sizes)  # (N,)
    row = torch.arange(rows)
    sequence = row - starts[step]
    neighbour = (step - 1 if d == 0 else step + 1).clamp(0, batch_sizes.numel() - 1)
    entered = sequence < batch_sizes[neighbour] if d == 1 else step > 0
    entered &= neighbour != step
    source = torch.where(entered, starts[neighbour] + sequence, rows + sequence)
    h = torch.cat((y, h0)).index_select(0, source.to(y.device))
    if reset is not None:
        # Forward: the step itself starts a segment. Reverse: the later step it came from does.
        first = reset.bool()
        if d == 1:
            at = torch.where(entered, source, 0).to(y.device)
            first = first.index_select(0, at) & entered.to(y.device)
        h = h.masked_fill(first.unsqueeze(-1), 0)
    return h

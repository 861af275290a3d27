"""What follows a backward walk: the products of (eq. 9), one for each gradient asked for.

On a GPU they are all there is; on the CPU, whose library has its own, those of samples are here.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .contract import Gradients, Requested, Reserve, Weights


def on_device(batch_sizes: Tensor, device: torch.device) -> Tensor:
    """A copy of ``batch_sizes`` on ``device``, made without waiting for the device."""
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        # A captured copy would read this memory again at every replay. Captured fills do not.
        values, counts = batch_sizes.unique_consecutive(return_counts=True)
        runs = zip(values.tolist(), counts.tolist(), strict=True)
        return torch.cat([batch_sizes.new_full((n,), value, device=device) for value, n in runs])
    return batch_sizes.to(device, non_blocking=True)


def first_rows(batch_sizes: Tensor) -> Tensor:
    """(T + 1) first row of each step, and the number of all rows; on the same device."""
    starts = batch_sizes.new_zeros(batch_sizes.numel() + 1)
    torch.cumsum(batch_sizes, 0, out=starts[1:])
    return starts


def walked_gradients(
    da: Tensor,
    dh_all: Tensor | None,
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
    """All gradients asked for, in storage dtype, from what a walk has left.

    Args:
        da: (N, D, 4H) gradients of the pre-activations, in storage dtype.
        dh_all: (N, D*P) gradients of every h, in storage dtype; None without a projection.
        dh0, dc0: (D, B, P) and (D, B, H), finished; None where not asked for.
    """
    directions, _, output_size = h0.shape
    das = da.unbind(1)  # by direction, (N, 4H)
    w_hh, w_hr = None, None
    if need.w_hh:
        ys = saved.y.split(output_size, 1)
        w_hh = [
            _summed_products(_beside_entered_h(das[d], d, ys[d], h0[d], batch_sizes, reset))
            for d in range(directions)
        ]
    if need.w_hr:
        if dh_all is None or saved.m is None:
            raise ValueError("dh_all, saved.m: got None, needed for the gradient of w_hr")
        pairs = zip(dh_all.chunk(directions, 1), saved.m.chunk(directions, 1), strict=True)
        w_hr = [dh.T @ m for dh, m in pairs]
    return Gradients(
        x=da.flatten(1) @ torch.cat([w.w_ih for w in weights]) if need.x else None,
        h0=dh0,
        c0=dc0,
        w_ih=[own.T @ x for own in das] if need.w_ih else None,
        w_hh=w_hh,
        bias=[own.sum(0, dtype=torch.float32).to(x.dtype) for own in das] if need.bias else None,
        w_hr=w_hr,
    )


def sample_gradients(
    samples: int,
    walked: tuple[Tensor, Tensor | None, Tensor | None, Tensor | None],
    x: Tensor,
    batch_sizes: Tensor,
    h0: Tensor,
    weights: Sequence[Weights],
    reset: Tensor | None,
    saved: Reserve,
    need: Requested,
) -> Gradients:
    """As ``walked_gradients``, but those of weights for each of so many samples, (samples, ...).

    The sequences of sample s are those whose number is s modulo ``samples``.  ``walked`` is da,
    dh_all, dh0 and dc0; the first two are in state dtype here, in which everything is multiplied.
    """
    da, dh_all, dh0, dc0 = walked
    state, dtype, output_size = da.dtype, x.dtype, h0.size(2)

    def apart(rows: Tensor) -> Tensor:
        """(samples, rows of one, ...)"""
        return rows.unflatten(0, (-1, samples)).transpose(0, 1)

    def products(left: Tensor, right: Tensor) -> Tensor:
        return torch.bmm(apart(left).mT, apart(right.to(state))).to(dtype)

    das = da.unbind(1)
    w_hh, w_hr = None, None
    if need.w_hh:
        ys = saved.y.split(output_size, 1)
        entered = [entered_h(d, y, h0[d], batch_sizes, reset) for d, y in enumerate(ys)]
        w_hh = [products(own, h) for own, h in zip(das, entered, strict=True)]
    if need.w_hr:
        if dh_all is None or saved.m is None:
            raise ValueError("dh_all, saved.m: got None, needed for the gradient of w_hr")
        pairs = zip(dh_all.chunk(len(das), 1), saved.m.chunk(len(das), 1), strict=True)
        w_hr = [products(dh, m) for dh, m in pairs]
    w_ih = torch.cat([w.w_ih for w in weights]).to(state) if need.x else None
    return Gradients(
        x=None if w_ih is None else (da.flatten(1) @ w_ih).to(dtype),
        h0=dh0,
        c0=dc0,
        w_ih=[products(own, x) for own in das] if need.w_ih else None,
        w_hh=w_hh,
        bias=[apart(own).sum(1).to(dtype) for own in das] if need.bias else None,
        w_hr=w_hr,
    )


def _summed_products(pieces: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """The sum of each left^T right."""
    (left, right), *others = pieces
    result = left.T @ right
    for left, right in others:
        result.addmm_(left.T, right)
    return result


def _beside_entered_h(
    da: Tensor, d: int, y: Tensor, h0: Tensor, batch_sizes: Tensor, reset: Tensor | None
) -> list[tuple[Tensor, Tensor]]:
    """``da (N, 4H)`` of direction ``d`` beside the h that entered each row's step, from
    ``y (N, P)`` and ``h0 (B, P)``, in one piece or two."""
    batch = len(h0)
    if reset is not None or batch_sizes.numel() * batch != len(y) or len(y) == 0:
        return [(da, entered_h(d, y, h0, batch_sizes, reset))]
    # Equal sizes: h_{t-1} is y moved by one step, and only its edge comes from h0.
    if d == 0:
        pieces = [(da[:batch], h0), (da[batch:], y[:-batch])]
    else:
        pieces = [(da[:-batch], y[batch:]), (da[-batch:], h0)]
    if len(da) >= da.size(1):
        return pieces
    # Copying h costs less than another pass over the result.
    return [(da, torch.cat([h for _, h in pieces]))]


def entered_h(d: int, y: Tensor, h0: Tensor, batch_sizes: Tensor, reset: Tensor | None) -> Tensor:
    """The h that entered the step of each row of direction ``d``, (N, P): from ``y (N, P)``, from
    ``h0 (B, P)``, or zero at a reset."""
    sizes = on_device(batch_sizes, y.device)
    starts = first_rows(sizes)
    row = torch.arange(len(y), device=y.device)
    step = torch.searchsorted(starts, row, right=True) - 1
    sequence = row - starts[step]
    neighbour = (step - 1 if d == 0 else step + 1).clamp(0, max(sizes.numel() - 1, 0))
    entered = sequence < sizes[neighbour] if d == 1 else step > 0
    entered &= neighbour != step
    source = torch.where(entered, starts[neighbour] + sequence, len(y) + sequence)
    h = torch.cat((y, h0)).index_select(0, source)
    if reset is None:
        return h
    # Forward: the step itself starts a segment. Reverse: the later step it came from does.
    first = reset.bool()
    if d == 1:
        first = first.index_select(0, torch.where(entered, source, 0)) & entered
    return h.masked_fill(first.unsqueeze(-1), 0)

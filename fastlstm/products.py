"""What follows a backward walk: the products of (eq. 9), one for each gradient asked for.

On a GPU they are all there is; on the CPU, whose library has its own, those of samples are here.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .contract import Gradients, Requested, Reserve, Weights
from .steps import apart, are_whole, entered


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
            _summed_products(_beside_h_in(das[d], d, ys[d], h0[d], batch_sizes, reset))
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

    See ``steps.apart`` for which rows are a sample's.  ``walked`` is da,
    dh_all, dh0 and dc0; the first two are in state dtype here, in which everything is multiplied.
    """
    da, dh_all, dh0, dc0 = walked
    state, dtype, output_size = da.dtype, x.dtype, h0.size(2)

    def products(left: Tensor, right: Tensor) -> Tensor:
        return torch.bmm(apart(left, samples).mT, apart(right.to(state), samples)).to(dtype)

    das = da.unbind(1)
    w_hh, w_hr = None, None
    if need.w_hh:
        ys = saved.y.split(output_size, 1)
        h_in = [entered(d, y, h0[d], batch_sizes, reset) for d, y in enumerate(ys)]
        w_hh = [products(own, h) for own, h in zip(das, h_in, strict=True)]
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
        bias=[apart(own, samples).sum(1).to(dtype) for own in das] if need.bias else None,
        w_hr=w_hr,
    )


def _summed_products(pieces: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """The sum of each left^T right."""
    (left, right), *others = pieces
    result = left.T @ right
    for left, right in others:
        result.addmm_(left.T, right)
    return result


def _beside_h_in(
    da: Tensor, d: int, y: Tensor, h0: Tensor, batch_sizes: Tensor, reset: Tensor | None
) -> list[tuple[Tensor, Tensor]]:
    """``da (N, 4H)`` of direction ``d`` beside the h that entered each row's step, from
    ``y (N, P)`` and ``h0 (B, P)``, in one piece or two."""
    batch = len(h0)
    if not are_whole(len(y), batch, batch_sizes, reset) or len(da) < da.size(1):
        return [(da, entered(d, y, h0, batch_sizes, reset))]  # copied where that costs less
    # Equal sizes: h_{t-1} is y moved by one step, and only its edge comes from h0.
    if d == 0:
        return [(da[:batch], h0), (da[batch:], y[:-batch])]
    return [(da[:-batch], y[batch:]), (da[-batch:], h0)]

"""The matrix products that follow a backward walk, shared by the kernels' backends.

Once the dgates of some rows are known, what is left of those rows (eq. 9) is one product for
each gradient asked for, in state dtype and in a fixed order.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .contract import Gradients, Requested, Reserve, Weights

# multiply(left, right, out, transposed, add): out (M, N) = or += op(left) right, op(left) being
# left^T if transposed.  left and out are in state dtype, right in storage dtype.
Multiply = Callable[[Tensor, Tensor, Tensor, bool, bool], None]


def torch_multiply(left: Tensor, right: Tensor, out: Tensor, transposed: bool, add: bool) -> None:
    """By torch's BLAS."""
    left = left.T if transposed else left
    right = right.to(left.dtype)
    if add:
        out.addmm_(left, right)
    else:
        torch.mm(left, right, out=out)


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


class Products:
    """Adds up the gradients of a layer's inputs, from the dgates of some rows at a time."""

    def __init__(
        self,
        x: Tensor,
        batch_sizes: Tensor,
        h0: Tensor,
        weights: Sequence[Weights],
        reset: Tensor | None,
        saved: Reserve,
        need: Requested,
    ) -> None:
        self._x, self._batch_sizes, self._h0, self._reset = x, batch_sizes, h0, reset
        self._weights, self._saved, self._need = weights, saved, need
        # Sums by kind and direction, in state dtype; a kind that is not asked for stays empty.
        self._sums: dict[tuple[str, int], Tensor] = {}
        self._dx: Tensor | None = None
        state = saved.c_all.dtype
        if need.x:
            self._dx = (
                torch.zeros_like(x, dtype=state)
                if len(weights) == 2
                else x.new_empty(x.shape, dtype=state)
            )

    def add(
        self,
        d: int,
        rows: slice,
        da: Tensor,
        dh_all: Tensor | None,
        dbias: Tensor | None,
        multiply: Multiply = torch_multiply,
    ) -> None:
        """Add what ``rows`` of direction ``d`` contribute.

        Args:
            da: (at least as many rows, 4H), gradients of their pre-activations.
            dh_all: (.., D*P), gradients of their h; needed for w_hr only.
            dbias: (D, 4H), da summed over them, or None.
        """
        count = rows.stop - rows.start
        da, need, w = da[:count], self._need, self._weights[d]
        if self._dx is not None:
            multiply(da, w.w_ih, self._dx[rows], False, len(self._weights) == 2)
        if need.w_ih:
            self._add_product("w_ih", d, da, self._x[rows], multiply)
        if need.w_hh:
            for da_part, h in self._previous_h(d, rows, da):
                self._add_product("w_hh", d, da_part, h, multiply)
        if need.bias and dbias is not None:
            known = self._sums.get(("bias", d))
            self._sums["bias", d] = dbias[d].clone() if known is None else known.add_(dbias[d])
        if need.w_hr:
            if dh_all is None or self._saved.m is None:
                raise ValueError("dh_all, saved.m: got None, needed for the gradient of w_hr")
            output_size, hidden_size = self._h0.size(-1), da.size(-1) // 4
            dh = dh_all[:count, d * output_size : (d + 1) * output_size]
            m = self._saved.m[rows, d * hidden_size : (d + 1) * hidden_size]
            self._add_product("w_hr", d, dh, m, multiply)

    def gradients(self, dh0: Tensor | None, dc0: Tensor | None) -> Gradients:
        """Everything asked for, in storage dtype; the states' gradients come finished."""
        storage, need = self._x.dtype, self._need

        def each(kind: str) -> list[Tensor] | None:
            if not getattr(need, kind):
                return None
            return [self._sums[kind, d].to(storage) for d in range(len(self._weights))]

        return Gradients(
            x=None if self._dx is None else self._dx.to(storage),
            h0=dh0,
            c0=dc0,
            w_ih=each("w_ih"),
            w_hh=each("w_hh"),
            bias=each("bias"),
            w_hr=each("w_hr"),
        )

    def _add_product(
        self, kind: str, d: int, left: Tensor, right: Tensor, multiply: Multiply
    ) -> None:
        """sum += left^T right, over rows; ``right`` in storage dtype."""
        known = self._sums.get((kind, d))
        if known is None:
            self._sums[kind, d] = left.new_empty(left.size(1), right.size(1))
        multiply(left, right, self._sums[kind, d], True, known is not None)

    def _previous_h(self, d: int, rows: slice, da: Tensor) -> list[tuple[Tensor, Tensor]]:
        """``da``'s rows beside the h that entered their steps, in one piece or two."""
        batch, output_size = self._h0.shape[1:]
        h0, y = self._h0[d], self._saved.y[:, d * output_size : (d + 1) * output_size]
        if self._reset is not None or self._batch_sizes.numel() * batch != len(y) or len(y) == 0:
            return [(da, entered_h(d, rows, y, h0, self._batch_sizes, self._reset))]
        # Equal sizes: h_{t-1} is y moved by one step, and only its edge comes from h0.
        if d == 0:
            if rows.start > 0:
                return [(da, y[rows.start - batch : rows.stop - batch])]
            return self._edge((da[:batch], h0), (da[batch:], y[: rows.stop - batch]), da)
        if rows.stop < len(y):
            return [(da, y[rows.start + batch : rows.stop + batch])]
        most = len(da) - batch
        return self._edge((da[:most], y[rows.start + batch :]), (da[most:], h0), da)

    @staticmethod
    def _edge(
        first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor], da: Tensor
    ) -> list[tuple[Tensor, Tensor]]:
        """Two pieces, or one where copying h costs less than another pass over the result."""
        if len(da) >= da.size(1):
            return [first, second]
        return [(da, torch.cat((first[1], second[1])))]


def entered_h(
    d: int, rows: slice, y: Tensor, h0: Tensor, batch_sizes: Tensor, reset: Tensor | None
) -> Tensor:
    """The h that entered each of ``rows`` of direction ``d``, (rows, P): from ``y (N, P)``, from
    ``h0 (B, P)``, or zero at a reset."""
    sizes = on_device(batch_sizes, y.device)
    starts = first_rows(sizes)
    row = torch.arange(rows.start, rows.stop, device=y.device)
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
    first = reset[rows].bool()
    if d == 1:
        at = torch.where(entered, source, 0)
        first = reset.bool().index_select(0, at) & entered
    return h.masked_fill(first.unsqueeze(-1), 0)

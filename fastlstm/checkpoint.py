"""A layer that keeps its inputs, its output and a few cell states, and makes its gates again.

The steps are cut into chunks, and each direction runs through them by itself, chunk by chunk,
as if each were a call.  Every h is in y, so what is kept besides is the cell state at the
chunks' borders.  The backward pass takes the chunks in the opposite order: it makes a chunk's
reserve, walks back through it, adds up, and lets go of it.

For every backend a chunk is a layer of one forward direction.  The reverse direction is one
too, once the rows of each sequence are put in the order in which it takes them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from . import backends, modes
from .contract import Borders, Gradients, OutputGradients, Outputs, Requested, Weights, state_dtype

# A chunk has a thirty-second of all rows, if those are enough for products with the weights to be
# efficient (half as many as there are units), and if their gates do not take more than this.
_CHUNKS, _LEAST_ROWS, _MOST_BYTES = 32, 128, 8 << 20
_KINDS = Requested._fields[3:]  # of weights


def chunk_steps(steps: int, x: Tensor, c0: Tensor) -> int:
    """The steps of a chunk, from shapes alone."""
    hidden_size = c0.size(2)
    least = max(_LEAST_ROWS, hidden_size // 2)
    most = max(_MOST_BYTES // (4 * hidden_size * state_dtype(x.dtype).itemsize), least)
    rows = torch.sym_max(least, torch.sym_min(most, x.size(0) // _CHUNKS))
    return torch.sym_max(1, rows * steps // torch.sym_max(x.size(0), 1))


class _Chunk(NamedTuple):
    """A range of steps, as one direction takes them."""

    number: int  # counted in this direction's order
    rows: slice  # of all packed rows
    sizes: Tensor  # of its steps
    batch: int  # sequences that have a step in it
    order: Tensor | None  # which of its rows comes k-th; None for the forward direction
    entering: slice  # rows of y with the h that enters it, of the first sequences; others have h0's
    reset: Tensor | None

    def of(self, rows: Tensor) -> Tensor:
        """This chunk's part of ``rows (N, ...)``, in this direction's order."""
        part = rows[self.rows]
        return part if self.order is None else part.index_select(0, self.order)


def _chunks(
    d: int, count: int, x: Tensor, batch_sizes: Tensor, reset: Tensor | None
) -> Iterator[_Chunk]:
    """The chunks of direction ``d``, ``count`` of all steps, in the order it takes them."""
    steps = int((batch_sizes > 0).sum())
    per_chunk = max(1, -(-batch_sizes.numel() // max(1, count)))
    starts = [0, *batch_sizes.cumsum(0).tolist()]
    sizes = [*batch_sizes.tolist(), 0]
    ranges = [(t, min(t + per_chunk, steps)) for t in range(0, steps, per_chunk)]
    for number, (begin, end) in enumerate(ranges if d == 0 else reversed(ranges)):
        rows = slice(starts[begin], starts[end])
        own_sizes, batch = batch_sizes[begin:end], sizes[begin]
        if d == 0:
            before = starts[begin - 1] if begin else 0
            entering = slice(before, before + (batch if begin else 0))
            marks = None if reset is None else reset[rows]
            yield _Chunk(number, rows, own_sizes, batch, None, entering, marks)
            continue
        step, sequence = _steps_and_sequences(own_sizes, batch)
        lengths = (own_sizes.unsqueeze(1) > torch.arange(batch, device="cpu")).sum(0)
        time = lengths[sequence] - 1 - step  # within the chunk
        first = torch.tensor(starts, device="cpu")
        order = first[begin + time] - rows.start + sequence
        own_reset = None
        if reset is not None:  # it loses its state on leaving a first step: at the step after it
            later = begin + time + 1
            there = torch.tensor(sizes, device="cpu")[later] > sequence
            source = torch.where(there, first[later] + sequence, 0)
            marks = reset.index_select(0, source.to(reset.device))
            own_reset = marks * there.to(reset.device, reset.dtype)
        entering = slice(starts[end], starts[end] + sizes[end])
        yield _Chunk(number, rows, own_sizes, batch, order.to(x.device), entering, own_reset)


def _steps_and_sequences(sizes: Tensor, batch: int) -> tuple[Tensor, Tensor]:
    """The step and the sequence of each of the packed rows of ``sizes``."""
    step, sequence = (sizes.unsqueeze(1) > torch.arange(batch, device="cpu")).nonzero(as_tuple=True)
    return step, sequence


def border_shape(batch_sizes: Tensor, x: Tensor, c0: Tensor) -> tuple[int, ...]:
    """Of ``Borders.c``, which has a place for each chunk of all steps, and one that stays empty: of
    a size that may be 1, torch.export would make a program for 1 alone, or for all others."""
    steps, per_chunk = batch_sizes.numel(), chunk_steps(batch_sizes.numel(), x, c0)
    return ((steps + per_chunk - 1) // per_chunk + 1, *c0.shape)


def layer_forward(
    x: Tensor,
    batch_sizes: Tensor,
    h0: Tensor,
    c0: Tensor,
    weights: Sequence[Weights],
    reset: Tensor | None,
    need_cells: bool,
    backend: str,
) -> tuple[Outputs, Borders]:
    """One layer, chunk by chunk."""
    directions, _, hidden_size = c0.shape
    output_size = h0.size(2)
    y = x.new_empty(x.size(0), directions * output_size)
    c_all = None
    if need_cells:
        c_all = x.new_empty(x.size(0), directions * hidden_size, dtype=state_dtype(x.dtype))
    borders = x.new_zeros(border_shape(batch_sizes, x, c0))
    h_n, c_n = h0.clone(), c0.clone()
    for d, w in enumerate(weights):
        y_d = y[:, d * output_size : (d + 1) * output_size]
        for chunk in _chunks(d, len(borders) - 1, x, batch_sizes, reset):
            h, c = h_n[d : d + 1, : chunk.batch], c_n[d : d + 1, : chunk.batch]
            borders[chunk.number, d, : chunk.batch] = c[0]
            here = chunk.of(x)
            call = backends.Call(
                here, chunk.sizes, h, w, chunk.reset, need_cells, False, train=True
            )
            out = backends.pick(backend, call).layer_forward(
                here, chunk.sizes, h, c, [w], chunk.reset, False, need_cells
            )
            _put(y_d, chunk, out.y)
            if c_all is not None and out.c_all is not None:
                _put(c_all[:, d * hidden_size : (d + 1) * hidden_size], chunk, out.c_all)
            h.copy_(out.h_n)
            c.copy_(out.c_n)
    return Outputs(y, c_all, h_n, c_n), Borders(y, borders)


def _put(rows: Tensor, chunk: _Chunk, part: Tensor) -> None:
    """The inverse of ``chunk.of``."""
    if chunk.order is None:
        rows[chunk.rows] = part
    else:
        rows[chunk.rows].index_copy_(0, chunk.order, part)


def layer_backward(
    grads: OutputGradients,
    x: Tensor,
    batch_sizes: Tensor,
    h0: Tensor,
    c0: Tensor,
    weights: Sequence[Weights],
    reset: Tensor | None,
    saved: Borders,
    need: Requested,
    backend: str,
) -> Gradients:
    """Gradients of the inputs asked for, from what ``layer_forward`` returned."""
    state = state_dtype(x.dtype)
    dh = torch.zeros_like(h0) if grads.h_n is None else grads.h_n.clone()
    dc = torch.zeros_like(c0) if grads.c_n is None else grads.c_n.clone()
    dx = x.new_zeros(x.shape, dtype=state) if need.x else None
    sums: list[dict[str, Tensor]] = [{} for _ in weights]
    # Not by x: samples that ran together may be walked back one by one.
    count = len(saved.c) - 1
    for d, w in enumerate(weights):
        for chunk in reversed(list(_chunks(d, count, x, batch_sizes, reset))):
            got = _chunk_backward(d, chunk, grads, dh, dc, x, h0, w, saved, need, backend)
            dh[d, : chunk.batch], dc[d, : chunk.batch] = got.h0[0], got.c0[0]  # type: ignore[index]
            if dx is not None and got.x is not None:
                if chunk.order is None:
                    dx[chunk.rows] += got.x
                else:
                    dx[chunk.rows].index_add_(0, chunk.order, got.x.to(state))
            for kind in _KINDS:
                part = getattr(got, kind)
                if part is None:
                    continue
                if kind in sums[d]:
                    sums[d][kind] += part[0]
                else:
                    sums[d][kind] = part[0].to(state)

    def each(kind: str) -> list[Tensor] | None:
        if not getattr(need, kind):
            return None
        return [
            sums[d][kind].to(x.dtype) if kind in sums[d] else torch.zeros_like(getattr(w, kind))
            for d, w in enumerate(weights)
        ]

    return Gradients(
        x=None if dx is None else dx.to(x.dtype),
        h0=dh if need.h0 else None,
        c0=dc if need.c0 else None,
        w_ih=each("w_ih"),
        w_hh=each("w_hh"),
        bias=each("bias"),
        w_hr=each("w_hr"),
    )


def _chunk_backward(
    d: int,
    chunk: _Chunk,
    grads: OutputGradients,
    dh: Tensor,
    dc: Tensor,
    x: Tensor,
    h0: Tensor,
    w: Weights,
    saved: Borders,
    need: Requested,
    backend: str,
) -> Gradients:
    """One chunk of direction ``d``: its reserve made again, and undone."""
    output_size, hidden_size = h0.size(2), dc.size(2)
    here, batch = chunk.of(x), chunk.batch

    def own(rows: Tensor | None, size: int) -> Tensor | None:  # (N, D*size) -> this direction's
        return None if rows is None else chunk.of(rows[:, d * size : (d + 1) * size]).contiguous()

    y_d = saved.y[:, d * output_size : (d + 1) * output_size]
    known = chunk.entering.stop - chunk.entering.start
    h = torch.cat((y_d[chunk.entering], h0[d, known:batch]))[None]
    c = saved.c[chunk.number, d : d + 1, :batch].contiguous()
    own_grads = OutputGradients(
        own(grads.y, output_size),
        own(grads.c_all, hidden_size),
        dh[d : d + 1, :batch].contiguous(),
        dc[d : d + 1, :batch].contiguous(),
    )
    inputs = (here, chunk.sizes, h, c, [w], chunk.reset)
    need_cells = grads.c_all is not None
    call = backends.Call(here, chunk.sizes, h, w, chunk.reset, need_cells, False, train=True)
    chosen = backends.pick(backend, call)
    asked = need._replace(h0=True, c0=True)
    if chosen.layer_backward is None:
        return _differentiated(chosen, own_grads, inputs, asked, need_cells)
    if chosen.layer_recompute is not None:
        reserve = chosen.layer_recompute(*inputs, own(saved.y, output_size))
    else:
        reserve = chosen.layer_forward(*inputs, True, False).reserve()
    return chosen.layer_backward(own_grads, *inputs, reserve, asked)


def _differentiated(
    chosen: backends.Backend,
    grads: OutputGradients,
    inputs: tuple[Tensor, Tensor, Tensor, Tensor, list[Weights], Tensor | None],
    need: Requested,
    need_cells: bool,
) -> Gradients:
    """A chunk's gradients by torch, for a backend that has no backward pass of its own."""
    x, sizes, h, c, (w,), reset = inputs
    flags = dict(zip(("x", "h", "c", *_KINDS), need, strict=True))
    with modes.recording():
        x, h, c = (t.detach().requires_grad_(flags[n]) for n, t in (("x", x), ("h", h), ("c", c)))
        w = Weights(
            *(
                t if t is None else t.detach().requires_grad_(flags[n])
                for n, t in zip(_KINDS, w, strict=False)  # without b_hh, which is None here
            )  # type: ignore[arg-type]
        )
        out = chosen.layer_forward(x, sizes, h, c, [w], reset, True, need_cells)
        pairs = [
            (o, g) for o, g in zip(out[:4], grads, strict=True) if o is not None and g is not None
        ]
        leaves = {n: t for n, t in zip(flags, (x, h, c, *w), strict=False) if flags[n]}
        results = torch.autograd.grad(
            [o for o, _ in pairs],
            list(leaves.values()),  # type: ignore[arg-type]
            [g for _, g in pairs],
            allow_unused=True,
            materialize_grads=True,
        )
    found = dict(zip(leaves, results, strict=True))
    weights = {n: [found[n]] if n in found else None for n in _KINDS}
    return Gradients(found.get("x"), found.get("h"), found.get("c"), **weights)

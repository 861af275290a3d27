"""The ``cpu`` backend: the fused C++ kernels of csrc/cpu under the layer contract.

The kernels walk through the sequence; the sums over all rows that follow a backward
walk (eq. 9) are plain matrix products, the library's own or torch's, whichever is faster.
"""

from __future__ import annotations

import functools
import itertools
import threading
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from . import native
from .contract import (
    Gradients,
    OutputGradients,
    Outputs,
    Requested,
    Reserve,
    Weights,
    state_dtype,
)
from .products import Products, entered_h, torch_multiply

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


def _contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def _present(tensor: Tensor) -> Tensor | None:
    """The library returns what was not asked for as an empty vector."""
    return None if tensor.dim() == 1 else tensor


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
        x.contiguous(),
        batch_sizes.contiguous(),
        h0.contiguous(),
        c0.contiguous(),
        [w.w_ih.contiguous() for w in weights],
        [w.w_hh.contiguous() for w in weights],
        [w.bias.contiguous() for w in weights if w.bias is not None],
        [w.w_hr.contiguous() for w in weights if w.w_hr is not None],
        _contiguous(reset),
        need_reserve,
        need_cells,
    )
    return Outputs(y, _present(c_all), h_n, c_n, _present(gates), _present(m))


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
    state, batch = state_dtype(x.dtype), h0.size(1)
    if reset is None and batch_sizes.numel() * batch == len(y) > 0:
        h_in = torch.cat((h0[0], y[: len(y) - batch]))
    else:
        h_in = entered_h(0, slice(0, len(y)), y, h0[0], batch_sizes, reset)
    w_ih, w_hh = w.w_ih.to(state).T, w.w_hh.to(state).T
    if w.bias is None:
        pre = torch.mm(x.to(state), w_ih)
    else:
        pre = torch.addmm(w.bias.to(state), x.to(state), w_ih)
    pre.addmm_(h_in.to(state), w_hh)
    c_all, gates, m = torch.ops.fastlstm_C.cpu_recompute.default(
        pre, batch_sizes, c0, reset, w.w_hr is not None
    )
    gates = pre if _present(gates) is None else gates
    return Reserve(y, c_all, gates.unsqueeze(1), _present(m))


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
    state = state_dtype(x.dtype)
    directions, batch, output_size = h0.shape
    hidden_size = c0.size(-1)
    chunks = list(_chunks(batch_sizes, directions * 4 * hidden_size * state.itemsize))
    products = Products(x, batch_sizes, h0, weights, reset, saved, need)
    empty = functools.partial(x.new_empty, dtype=state)
    rows = max(chunk.rows[d].stop - chunk.rows[d].start for chunk in chunks for d in (0, 1))
    da = _taken_dgates(x, (rows, directions, 4 * hidden_size), state)
    dh_all = empty(rows, directions * output_size) if need.w_hr else None
    dbias = empty(directions, 4 * hidden_size) if need.bias else None
    several = len(chunks) > 1
    da_carry = empty(directions, batch, 4 * hidden_size) if several else None
    dc_carry = empty(directions, batch, hidden_size) if several else None
    dh0 = torch.empty_like(h0, memory_format=torch.contiguous_format) if need.h0 else None
    dc0 = torch.empty_like(c0, memory_format=torch.contiguous_format) if need.c0 else None
    given = (
        *map(_contiguous, grads),
        batch_sizes.contiguous(),
        c0.contiguous(),
        [w.w_hh.contiguous() for w in weights],
        [w.w_hr.contiguous() for w in weights if w.w_hr is not None],
        _contiguous(reset),
        saved.c_all.contiguous(),
        saved.gates.contiguous(),
    )
    for chunk in chunks:
        bounded = torch.ops.fastlstm_C.cpu_backward(
            *given, chunk.begin, chunk.end, da, dh_all, dbias, dh0, dc0, da_carry, dc_carry
        )
        multiply = functools.partial(_multiply, bounded)
        for d in range(directions):
            products.add(d, chunk.rows[d], da[:, d], dh_all, dbias, multiply)
    _kept.dgates = da if da.nbytes <= 2 * _CHUNK_BYTES else None
    return products.gradients(dh0, dc0)


def _multiply(
    bounded: bool, left: Tensor, right: Tensor, out: Tensor, transposed: bool, add: bool
) -> None:
    """By the library where it is faster, else by torch."""
    if not torch.ops.fastlstm_C.cpu_product(left, right, out, transposed, add, bounded):
        torch_multiply(left, right, out, transposed, add)


_kept = threading.local()


def _taken_dgates(x: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Memory for one chunk.  Each thread keeps its last, since fresh pages cost a fault each, but
    not while it is in use: a signal handler may run another backward pass in between.
    """
    kept: Tensor | None = getattr(_kept, "dgates", None)
    _kept.dgates = None
    if kept is not None and kept.shape == shape and kept.dtype == dtype:
        return kept
    return x.new_empty(shape, dtype=dtype)


class _Chunk(NamedTuple):
    """Steps of a walk, in the order they are undone, and the rows each direction has in them."""

    begin: int
    end: int
    rows: tuple[slice, slice]


# A chunk's dgates are about this large, if that is rows enough for the products to be efficient.
_CHUNK_BYTES = 8 << 20
_CHUNK_ROWS = 1024


def _chunks(batch_sizes: Tensor, row_bytes: int) -> Iterator[_Chunk]:
    """Cut a walk whose dgates take ``row_bytes`` a row into chunks of equally many steps."""
    starts = [0, *itertools.accumulate(size for size in batch_sizes.tolist() if size)]
    steps, rows = len(starts) - 1, starts[-1]
    per_chunk = max(_CHUNK_ROWS, _CHUNK_BYTES // row_bytes) * steps // max(rows, 1)
    for begin in range(0, max(steps, 1), max(per_chunk, 1)):
        end = min(begin + max(per_chunk, 1), steps)
        forward = slice(starts[steps - end], starts[steps - begin])
        yield _Chunk(begin, end, (forward, slice(starts[begin], starts[end])))

"""Layers and dropout over packed rows, and every form of input as packed rows.

``lstm`` runs a stack of layers over packed rows (``contract.py`` says what those
are and what the letters of shapes stand for).  ``lstm_padded``, ``lstm_lengths``,
``lstm_packed`` and ``lstm_jagged`` turn what users hold into packed rows and back.  All are
differentiable.  Arguments are checked in ``module.py``, except for ``lengths`` and
the fit of a packed ``reset``, which are checked where they are read.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from . import modes
from .autograd import layer_gates, lstm_layer
from .contract import Weights
from .packing import Packing, checked_lengths, pack


class Stack(NamedTuple):
    """What to run over the rows, whatever form they came in."""

    layers: Sequence[Sequence[Weights]]  # per layer, per direction
    dropout: float = 0.0  # on the output of every layer but the last; 0 in evaluation
    need_cells: bool = False
    backend: str = "auto"
    checkpoint: bool = False
    gates_of: int | None = None  # a layer, from 0, whose gates are wanted instead of all results


class Result(NamedTuple):
    """The last layer's outputs and cells, and every layer's final states.

    Of a stack with ``gates_of``: gates (..., 4*D*H) as output, i, f, g, o, each of all directions;
    the rest means nothing.
    """

    output: Tensor | PackedSequence  # (..., D*P)
    h_n: Tensor  # (L*D, B, P)
    c_n: Tensor  # (L*D, B, H)
    cells: Tensor | PackedSequence | None  # (..., D*H) in the dtype of output


class _Rows(NamedTuple):
    output: Tensor  # (N, D*P)
    h_n: Tensor  # (L*D, B, P)
    c_n: Tensor  # (L*D, B, H)
    cells: Tensor | None  # (N, D*H)


def lstm(
    rows: Tensor,
    batch_sizes: Tensor,
    h0: Tensor,
    c0: Tensor,
    stack: Stack,
    reset: Tensor | None = None,
) -> _Rows:
    """Run ``stack`` over packed rows.

    ``rows (N, I)``, or ``(T, B, I)`` where all sequences have all steps, as the results then are;
    ``batch_sizes (T,)`` int64 on the CPU, ``h0 (L*D, B, P)``,
    ``c0 (L*D, B, H)``, ``reset (N,)`` uint8.  Under autocast everything but float64
    is cast once here, as ``nn.LSTM`` does, and the layers run outside of it.
    """
    dtype = modes.autocast_dtype(rows.device)
    if dtype is not None:
        with modes.without_autocast(rows.device):
            rows, h0, c0 = (_cast(t, dtype) for t in (rows, h0, c0))
            layers = [[_cast_weights(w, dtype) for w in layer] for layer in stack.layers]
            return lstm(rows, batch_sizes, h0, c0, stack._replace(layers=layers), reset)

    last = len(stack.layers) - 1
    directions = len(stack.layers[0])
    # A single layer's states are the whole; splitting and joining them would only cost time.
    h_in = h0.split(directions) if last else (h0,)
    c_in = c0.split(directions) if last else (c0,)
    h_out, c_out = [], []
    for k, weights in enumerate(stack.layers):
        if k == stack.gates_of:
            gates = layer_gates(
                rows, batch_sizes, h_in[k], c_in[k], weights, reset, backend=stack.backend
            )
            gates = gates.unflatten(-1, (4, -1)).transpose(1, 2)  # from (N, D, 4H)
            width = gates.shape[1:].numel()
            return _Rows(gates.reshape(*rows.shape[:-1], width), h0, c0, None)
        rows, cells, h_n, c_n = lstm_layer(
            rows,
            batch_sizes,
            h_in[k],
            c_in[k],
            weights,
            reset,
            need_cells=stack.need_cells and k == last,
            backend=stack.backend,
            checkpoint=stack.checkpoint,
        )
        h_out.append(h_n)
        c_out.append(c_n)
        if stack.dropout and k < last:
            rows = F.dropout(rows, stack.dropout)
    if last:
        h_n, c_n = torch.cat(h_out), torch.cat(c_out)
    return _Rows(rows, h_n, c_n, None if cells is None else cells.to(rows.dtype))


def has_changeable_output(dtype: torch.dtype, directions: int, projected: bool) -> bool:
    """May such an nn.LSTM's output be changed in place before the backward pass, for padded input
    on the CPU?  Unless oneDNN made it, which keeps it for the backward pass.  Layers here keep
    theirs too, so elsewhere the caller is given a copy.  (That of packed input always may.)"""
    if dtype != torch.float32 or directions == 2 or projected:
        return True
    return not (torch.backends.mkldnn.enabled and torch.backends.mkldnn.is_available())


def _is_kept(result: _Rows) -> bool:
    """Does a backward pass on the CPU need the output as it is?  (torch.compile sees to that.)"""
    output = result.output
    if torch.compiler.is_compiling() or not output.is_cpu:
        return False
    return output.requires_grad or modes.is_transformed()  # which an outer transform may do


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Autocast's rule: float64 is left alone."""
    return tensor if tensor.dtype == torch.float64 else tensor.to(dtype)


def _cast_weights(weights: Weights, dtype: torch.dtype) -> Weights:
    return Weights(*(None if w is None else _cast(w, dtype) for w in weights))  # type: ignore[arg-type]


def lstm_padded(
    input: Tensor,
    h0: Tensor,
    c0: Tensor,
    stack: Stack,
    *,
    batch_first: bool = False,
    reset: Tensor | None = None,
    changeable: bool = False,
) -> Result:
    """Sequences of equal length.

    ``input (T, B, I)`` and ``reset (T, B)`` bool, or ``(B, T, I)`` and ``(B, T)``.
    A contiguous ``(T, B, I)`` is packed rows already: nothing is copied.  The output may be changed
    in place before the backward pass if nn.LSTM's may, or if it is to be ``changeable``.
    """
    if batch_first:
        input = input.transpose(0, 1)
        reset = None if reset is None else reset.t()
    steps, batch, _ = input.shape
    result = lstm(
        input.contiguous(),
        torch.full((steps,), batch, dtype=torch.int64, device="cpu"),
        h0,
        c0,
        stack,
        None if reset is None else reset.flatten().view(torch.uint8),
    )

    if _is_kept(result):
        weights = stack.layers[-1]
        projected = weights[0].w_hr is not None
        if changeable or has_changeable_output(result.output.dtype, len(weights), projected):
            result = result._replace(output=result.output.clone())
    if not batch_first:
        return Result(*result)
    return _with_form(result, lambda rows: rows.transpose(0, 1))


def lstm_lengths(
    input: Tensor,
    lengths: Tensor | Sequence[int],
    h0: Tensor,
    c0: Tensor,
    stack: Stack,
    *,
    batch_first: bool = False,
    reset: Tensor | None = None,
) -> Result:
    """Padded sequences of the given ``lengths (B,)``, in any order, zeros allowed.

    Shapes as in ``lstm_padded``.  What lies beyond a sequence's length is not read,
    and is zero in the output; a sequence of length zero gets its initial state back.
    """
    batch, steps = input.shape[:2] if batch_first else (input.size(1), input.size(0))
    lengths = checked_lengths(lengths, batch)
    # A graph serves all lengths, so while it is traced nothing may depend on their values.
    if not modes.is_traced(lengths, input) and bool((lengths == steps).all()):
        # Of shorter sequences the output is one of its own, so here it is too.
        return lstm_padded(
            input, h0, c0, stack, batch_first=batch_first, reset=reset, changeable=True
        )

    packing = pack(lengths, steps)
    step, sequence = packing.step, packing.sequence
    row = sequence * steps + step if batch_first else step * batch + sequence
    reset = None if reset is None else reset.flatten()
    result = _lstm_of_rows(input.flatten(0, 1), row, packing, h0, c0, stack, reset)

    def padded(rows: Tensor) -> Tensor:
        return rows.unflatten(0, input.shape[:2])

    return _with_form(result, padded)


def _lstm_of_rows(
    values: Tensor,
    row: Tensor,
    packing: Packing,
    h0: Tensor,
    c0: Tensor,
    stack: Stack,
    reset: Tensor | None,
) -> _Rows:
    """Of all rows ``values (.., I)`` those that ``row (N,)`` says, packed; the others aren't read.

    Results are like ``values``, zero in those others, and states in the user's order; ``reset`` is
    a bool for each of ``values``.
    """
    row, order, unsort = (t.to(values.device) for t in (row, packing.order, packing.unsort))
    result = lstm(
        values.index_select(0, row),
        packing.batch_sizes,
        h0.index_select(1, order),
        c0.index_select(1, order),
        stack,
        None if reset is None else reset.index_select(0, row).view(torch.uint8),
    )

    def spread(rows: Tensor | None) -> Any:
        if rows is None:
            return None
        zeros = rows.new_zeros(values.size(0), rows.size(1))
        if modes.is_transformed():  # vmap would do the other sample by sample
            return zeros.index_copy(0, row, rows)
        return zeros.index_copy_(0, row, rows)

    output, h_n, c_n, cells = result
    h_n, c_n = h_n.index_select(1, unsort), c_n.index_select(1, unsort)
    return _Rows(spread(output), h_n, c_n, spread(cells))


def lstm_jagged(
    values: Tensor,
    offsets: Tensor,
    lengths: Tensor | None,
    h0: Tensor,
    c0: Tensor,
    stack: Stack,
    *,
    reset: Tensor | None = None,
) -> Result:
    """Sequences laid end to end: sequence b begins with row ``offsets[b]`` of ``values (N, I)``.

    ``offsets (B + 1,)``; ``lengths (B,)`` if there are rows between sequences, which are not
    read and are zero in the output; ``reset (N,)`` bool.
    """
    offsets = offsets.to("cpu", torch.int64)
    lengths = offsets.diff() if lengths is None else lengths.to("cpu", torch.int64)
    steps = int(lengths.max()) if len(lengths) else 0
    packing = pack(lengths, steps)
    row = offsets[packing.sequence] + packing.step
    return Result(*_lstm_of_rows(values, row, packing, h0, c0, stack, reset))


def lstm_packed(
    input: PackedSequence,
    h0: Tensor,
    c0: Tensor,
    stack: Stack,
    *,
    reset: PackedSequence | None = None,
) -> Result:
    """A PackedSequence; ``reset`` is one of bool, packed alike.  States are in the user's order."""
    data, batch_sizes, order, unsort = input
    if order is not None:
        h0, c0 = h0.index_select(1, order), c0.index_select(1, order)
    if reset is not None and not _packed_alike(reset, input):
        raise ValueError(
            "reset: expected a PackedSequence packed like input (same batch_sizes and "
            f"sorted_indices), got batch_sizes {reset.batch_sizes.tolist()} for input's "
            f"{batch_sizes.tolist()}"
        )
    result = lstm(
        data,
        batch_sizes,
        h0,
        c0,
        stack,
        None if reset is None else reset.data.contiguous().view(torch.uint8),
    )
    if _is_kept(result):
        result = result._replace(output=result.output.clone())
    return _with_form(result, lambda rows: PackedSequence(rows, batch_sizes, order, unsort), unsort)


def _with_form(
    result: _Rows,
    form: Callable[[Tensor], Tensor] | Callable[[Tensor], PackedSequence],
    unsort: Tensor | None = None,
) -> Result:
    """Bring rows into the user's ``form`` and states into the user's order."""
    output, h_n, c_n, cells = result
    if unsort is not None:
        h_n, c_n = h_n.index_select(1, unsort), c_n.index_select(1, unsort)
    return Result(form(output), h_n, c_n, None if cells is None else form(cells))


def _packed_alike(a: PackedSequence, b: PackedSequence) -> bool:
    if not torch.equal(a.batch_sizes, b.batch_sizes):
        return False
    if a.sorted_indices is None or b.sorted_indices is None:
        return a.sorted_indices is b.sorted_indices
    return torch.equal(a.sorted_indices, b.sorted_indices)

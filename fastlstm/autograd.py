"""Differentiation of one layer: what is saved, and second order.

``LSTMLayer`` is the autograd Function over the two operators of ``ops.py``.  Its
backward pass is itself differentiable: the gradient of a gradient is taken through what
torch differentiates by itself (``backends.differentiable``), so second order works on
every backend.  Under torch.func transforms and forward-mode differentiation, where an
opaque operator would give wrong or zero tangents, the reference runs instead.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import backends, modes, ops, reference
from .contract import Borders, OutputGradients, Outputs, Requested, Reserve, Weights


class Run(NamedTuple):
    """What a layer call consists of besides tensors."""

    need_cells: bool
    backend: str
    checkpoint: bool
    chosen: backends.Backend | None = None  # what ``backend`` came to, where it was called directly


def lstm_layer(
    x: Tensor,
    batch_sizes: Tensor,
    h0: Tensor,
    c0: Tensor,
    weights: Sequence[Weights],
    reset: Tensor | None = None,
    *,
    need_cells: bool = False,
    backend: str = "auto",
    checkpoint: bool = False,
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """Run one layer, differentiably.

    Args:
        x: (N, I) packed rows, or (T, B, I) where all sequences have all steps; float16, bfloat16,
            float32 or float64.
        batch_sizes: (T,) int64 on the CPU, never increasing; may end in zeros.
        h0, c0: (D, B, P) and (D, B, H) initial states; ``B >= batch_sizes[0]``.
        weights: one ``Weights`` per direction, in ``x``'s dtype and on its device.
        reset: (N,) uint8; 1 marks the first step of a new segment.
        need_cells: also return every cell state.
        backend: a name in ``available_backends()``, or "auto".
        checkpoint: keep the inputs, y and a few cell states for the backward pass, which
            makes the rest again.

    Returns:
        y (N, D*P); every c_t (N, D*H) in ``state_dtype(x.dtype)``, or None; h_n (D, B, P);
        c_n (D, B, H).  y and cells are (T, B, ...) where x is.

    Raises:
        ValueError: an argument does not fit; the message names it.
        RuntimeError: ``backend`` cannot serve this call; the message says why.
    """
    ops.check_layer(x, batch_sizes, h0, c0, weights, reset)
    flat = [t for w in weights for t in w]
    train = torch.is_grad_enabled() and any(
        t is not None and t.requires_grad for t in (x, h0, c0, *flat)
    )
    composite, traced = modes.is_transformed(), modes.is_traced(x, h0, *flat)
    chosen = None  # by name only, in checkpoint.py or behind an operator
    if not (composite or traced or checkpoint):
        call = backends.Call(
            x, batch_sizes, h0, weights[0], reset, need_cells, need_reserve=False, train=train
        )
        chosen = backends.pick(backend, call)
    given = x
    if chosen is None or not chosen.padded:
        x = _rows(x)
    y: Tensor
    cells: Tensor | None
    if train and not composite and (chosen is None or chosen.layer_backward is not None):
        # An opaque operator's backward pass can't be torch's own but by running forward again.
        checkpoint |= traced and backends.lacks_backward(backend, x, reset, need_cells)
        run = Run(need_cells, backend, checkpoint, chosen)
        if torch.compiler.is_compiling():  # it wants every input of a Function to be another one
            x, h0, c0, *flat = (t if t is None else t.view_as(t) for t in (x, h0, c0, *flat))  # type: ignore[assignment]
        y, h_n, c_n, *rest = LSTMLayer.apply(run, batch_sizes, reset, x, h0, c0, *flat)
        cells = rest[0] if need_cells else None
    else:  # torch differentiates it by itself, or nobody does
        args = (x, batch_sizes, h0, c0, [w.summed() for w in weights], reset)
        if composite:
            out = reference.layer_forward(*args, False, need_cells)
        elif chosen is not None:
            out = chosen.layer_forward(*args, train, need_cells)
        else:
            out = ops.layer_forward(*args, False, need_cells, backend)
        y, h_n, c_n = out.y, out.h_n, out.c_n
        cells = out.c_all if need_cells else None
    if given.dim() == 3 and x.dim() == 2:
        y, cells = _shaped(y, given), None if cells is None else _shaped(cells, given)
    return y, cells, h_n, c_n


def _rows(values: Tensor) -> Tensor:
    """(T, B, size) as packed rows."""
    return values.flatten(0, 1) if values.dim() == 3 else values


def _shaped(rows: Tensor, like: Tensor) -> Tensor:
    """The inverse of ``_rows``: packed rows in the form of ``like``."""
    return rows.unflatten(0, like.shape[:2]) if like.dim() == 3 else rows


def layer_gates(
    x: Tensor,
    batch_sizes: Tensor,
    h0: Tensor,
    c0: Tensor,
    weights: Sequence[Weights],
    reset: Tensor | None = None,
    *,
    backend: str = "auto",
) -> Tensor:
    """Gates (N, D, 4H) after activation, in storage dtype: what the backward pass is given.

    Arguments and errors as of ``lstm_layer``.  Where ``backend`` keeps none, "auto" picks one that
    does.  They carry no gradient.
    """
    ops.check_layer(x, batch_sizes, h0, c0, weights, reset)
    with torch.no_grad():
        args = (_rows(x), batch_sizes, h0, c0, [w.summed() for w in weights], reset)
        if modes.is_transformed():
            out = reference.layer_forward(*args, True, False)
        else:
            keeper = "auto" if backends.keeps_nothing(backend) else backend
            out = ops.layer_forward(*args, True, False, keeper)
    assert out.gates is not None  # asked for
    return out.gates


def unflatten(flat: Sequence[Tensor | None]) -> list[Weights]:
    """The fields of each direction's ``Weights`` in turn, back to those."""
    size = len(Weights._fields)
    return [Weights(*flat[k : k + size]) for k in range(0, len(flat), size)]  # type: ignore[arg-type]


class LSTMLayer(torch.autograd.Function):
    """(run, batch_sizes, reset, x, h0, c0, *flat weights) -> y, h_n, c_n[, c_all]."""

    @staticmethod
    def forward(
        ctx: Any,
        run: Run,
        batch_sizes: Tensor,
        reset: Tensor | None,
        x: Tensor,
        h0: Tensor,
        c0: Tensor,
        *flat: Tensor | None,
    ) -> tuple[Tensor | None, ...]:
        weights, saved = [w.summed() for w in unflatten(flat)], None
        if run.checkpoint:
            out, saved = ops.checkpoint_forward(
                x, batch_sizes, h0, c0, weights, reset, run.need_cells, run.backend
            )
        elif run.chosen is not None:
            out = run.chosen.layer_forward(
                x, batch_sizes, h0, c0, weights, reset, True, run.need_cells
            )
        else:
            out = ops.layer_forward(
                x, batch_sizes, h0, c0, weights, reset, True, run.need_cells, run.backend
            )
        ctx.set_materialize_grads(False)
        ctx.run = run
        # Saved this way, a tensor that is changed in place before the backward pass is noticed.
        kept = out.reserve() if saved is None else saved
        ctx.save_for_backward(*kept, batch_sizes, reset, x, h0, c0, *flat)
        if run.need_cells:
            return out.y, out.h_n, out.c_n, out.c_all
        return out.y, out.h_n, out.c_n

    @staticmethod
    def backward(
        ctx: Any,
        dy: Tensor | None,
        dh_n: Tensor | None,
        dc_n: Tensor | None,
        dc_all: Tensor | None = None,
    ) -> tuple[Any, ...]:
        saved = ctx.saved_tensors  # once: checkpointing recomputes them at each look
        kept: type[Borders] | type[Reserve] = Borders if ctx.run.checkpoint else Reserve
        count = len(kept._fields)
        reserve, (batch_sizes, reset, *inputs) = kept(*saved[:count]), saved[count:]
        grads, asked = (dy, dc_all, dh_n, dc_n), ctx.needs_input_grad[3:]
        return (
            None,
            None,
            None,
            *gradients(ctx.run, asked, reserve, batch_sizes, reset, grads, inputs),
        )


def gradients(
    run: Run,
    asked: Sequence[bool],
    reserve: Reserve | Borders,
    batch_sizes: Tensor,
    reset: Tensor | None,
    grads: Sequence[Tensor | None],
    inputs: Sequence[Any],
) -> Sequence[Tensor | None]:
    """Gradients of ``inputs``, (x, h0, c0, *flat weights), from ``grads`` of y, c_all, h_n and c_n:
    with a graph, or batched, as they are wanted.  None where not ``asked`` for."""
    need, compiling = _requested(asked), torch.compiler.is_compiling()
    with modes.without_autocast(inputs[0].device):
        if modes.is_transformed() or (not compiling and any(map(modes.is_batched, grads))):
            return _batched_gradients(run, batch_sizes, reset, grads, inputs, asked)
        if torch.is_grad_enabled() or compiling:
            return LSTMLayerBackward.apply(run, need, reserve, batch_sizes, reset, *grads, *inputs)
        # Nobody asks for a graph of it, which would cost time.
        return _first_order(run, need, reserve, batch_sizes, reset, grads, inputs)


def _first_order(
    run: Run,
    need: Requested,
    reserve: Reserve | Borders,
    batch_sizes: Tensor,
    reset: Tensor | None,
    grads: Sequence[Tensor | None],
    inputs: Sequence[Any],
) -> tuple[Tensor | None, ...]:
    """Gradients of (x, h0, c0, *flat weights), None where not asked for."""
    x, h0, c0, *flat = inputs
    weights, output_grads = unflatten(flat), OutputGradients(*grads)
    if isinstance(reserve, Borders):
        summed = [w.summed() for w in weights]
        got = ops.checkpoint_backward(
            output_grads, x, batch_sizes, h0, c0, summed, reset, reserve, need, run.backend
        )
    else:  # which does not look at the biases
        got = ops.layer_backward(
            output_grads, x, batch_sizes, h0, c0, weights, reset, reserve, need,
            run.backend, run.chosen,
        )  # fmt: skip
    # Two biases have a gradient each: whoever changes one has not changed both.
    two = got.bias is not None and weights[0].b_hh is not None
    b_hh = [bias.clone() for bias in got.bias or ()] if two else None
    kinds = (got.w_ih, got.w_hh, got.bias, got.w_hr, b_hh)
    by_direction = [
        None if kind is None or weight is None else kind[d]
        for d, w in enumerate(weights)
        for kind, weight in zip(kinds, w, strict=True)
    ]
    return got.x, got.h0, got.c0, *by_direction


def _batched_gradients(
    run: Run,
    batch_sizes: Tensor,
    reset: Tensor | None,
    grads: Sequence[Tensor | None],
    inputs: Sequence[Tensor | None],
    asked: Sequence[bool],
) -> list[Tensor | None]:
    """Through the reference, for gradients that a transform has wrapped."""
    again = torch.is_grad_enabled()
    with torch.enable_grad():
        # (A transform lets no tensor be made a leaf.)
        leaves = aliases(inputs, asked, again or modes.is_transformed())
        return _composite_gradients(run, batch_sizes, reset, [*grads, *leaves], again)


def aliases(tensors: Sequence[Tensor | None], asked: Sequence[bool], again: bool) -> list[Any]:
    """Of each tensor one of its own, so that one given for two arguments counts once in each;
    with the graph that leads to it, if it is to be differentiated ``again``."""
    return [
        t if t is None else t.view_as(t) if again else t.detach().requires_grad_(a)
        for t, a in zip(tensors, asked, strict=True)
    ]


def _requested(flags: Sequence[bool]) -> Requested:
    """needs_input_grad of (x, h0, c0, *flat weights) by kind."""
    size = len(Weights._fields)
    here, *other = (flags[k : k + size] for k in range(3, len(flags), size))
    for there in other:
        here = tuple(a or b for a, b in zip(here, there, strict=True))
    w_ih, w_hh, bias, w_hr, b_hh = here
    x, h0, c0 = flags[:3]
    return Requested(x, h0, c0, w_ih, w_hh, bias or b_hh, w_hr)


class LSTMLayerBackward(torch.autograd.Function):
    """The backward pass as a Function, so that it can be differentiated again."""

    @staticmethod
    def forward(
        ctx: Any,
        run: Run,
        need: Requested,
        reserve: Reserve | Borders,
        batch_sizes: Tensor,
        reset: Tensor | None,
        *tensors: Any,  # gradients of y, c_all, h_n, c_n; x, h0, c0, *flat weights
    ) -> tuple[Tensor | None, ...]:
        ctx.set_materialize_grads(False)
        ctx.run = run
        ctx.save_for_backward(batch_sizes, reset, *tensors)
        return _first_order(run, need, reserve, batch_sizes, reset, tensors[:4], tensors[4:])

    @staticmethod
    def backward(ctx: Any, *grads_of_grads: Tensor | None) -> tuple[Any, ...]:
        """Second order, by differentiating twice what torch differentiates by itself.

        The gradient of <forward(inputs), grads> is what ``forward`` above returned;
        it is linear in ``grads`` and depends on the inputs through the whole layer.
        """
        again = torch.is_grad_enabled()  # third order wanted: keep the graph to the originals
        batch_sizes, reset, *saved = ctx.saved_tensors
        asked = ctx.needs_input_grad[5:]
        x, h0, _, w_ih, w_hh, bias, w_hr, *_ = saved[4:]
        weights = Weights(w_ih, w_hh, bias, w_hr)
        call = backends.Call(_rows(x), batch_sizes, h0, weights, reset, ctx.run.need_cells, False)
        forward = backends.differentiable(call).layer_forward
        with modes.without_autocast(x.device):
            with torch.enable_grad():
                tensors = aliases(saved, asked, again)
                first = _composite_gradients(ctx.run, batch_sizes, reset, tensors, True, forward)
            wanted = [t for t, a in zip(tensors, asked, strict=True) if a]
            second = iter(differentiate(first, wanted, grads_of_grads, create_graph=again))
        return (None,) * 5 + tuple(next(second) if a else None for a in asked)


def _composite_gradients(
    run: Run,
    batch_sizes: Tensor,
    reset: Tensor | None,
    tensors: list[Any],
    create_graph: bool,
    forward: Callable[..., Outputs] = reference.layer_forward,
) -> list[Tensor | None]:
    """Gradients of (x, h0, c0, *flat weights) through a ``forward`` that torch differentiates."""
    grads, (x, h0, c0, *flat) = tensors[:4], tensors[4:]
    weights = [w.summed() for w in unflatten(flat)]
    out = forward(_rows(x), batch_sizes, h0, c0, weights, reset, False, run.need_cells)
    rows = [None if r is None else _shaped(r, x) for r in (out.y, out.c_all)]
    inputs = [t for t in tensors[4:] if t is not None and t.requires_grad]
    found = iter(differentiate((*rows, out.h_n, out.c_n), inputs, grads, create_graph))
    return [next(found) if t is not None and t.requires_grad else None for t in tensors[4:]]


def differentiate(
    outputs: Sequence[Tensor | None],
    inputs: Sequence[Tensor],
    grad_outputs: Sequence[Tensor | None],
    create_graph: bool,
) -> Sequence[Tensor | None]:
    """torch.autograd.grad, leaving out outputs that are absent, constant or get no gradient."""
    pairs = [
        (o, g)
        for o, g in zip(outputs, grad_outputs, strict=True)
        if o is not None and g is not None and o.requires_grad
    ]
    if not pairs or not inputs:
        return [None] * len(inputs)
    return torch.autograd.grad(
        [o for o, _ in pairs],
        inputs,
        [g for _, g in pairs],
        create_graph=create_graph,
        allow_unused=True,
    )

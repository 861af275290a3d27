"""One layer, differentiably: what runs it, and what is saved of it.

``LSTMLayer`` is the autograd Function over the two operators of ``ops.py``; under torch.func's
``grad``, ``vjp``, ``vmap`` and ``jvp`` and in forward mode it is ``TransformedLayer``.  Under other
transforms, ``jvp`` of ``jvp``, and ``jvp`` on backends without tangents, where an opaque operator
would give wrong or zero tangents, the reference runs instead.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import backends, exported, modes, ops, reference, samples  # noqa: F401  (exported: operators)
from .backward import gradients
from .contract import Borders, Outputs, Reserve, Weights
from .gradients import Run, asked_for, keep, keep_transformed, packed_rows, shaped, unflatten
from .second_order import LayerTangents

# vmap's models, which have weights of their own, are run one by one, or by the reference step by
# step: so many models cost as much as a step (docs/performance.md).
MODELS_PER_STEP = 3


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
    transformed, traced = modes.is_transformed(), modes.is_traced(x, h0, *flat)
    # (What the innermost transform does not differentiate may still be for an outer one.)
    train = torch.is_grad_enabled() and (
        transformed or any(t is not None and t.requires_grad for t in (x, h0, c0, *flat))
    )
    forward_mode = transformed and modes.is_forward_mode()
    train |= forward_mode  # which needs the gates
    composite = transformed and not _has_functions_for_transforms(batch_sizes, x, h0, c0, flat)
    composite |= forward_mode and (traced or checkpoint or modes.is_forward_mode_nested())
    chosen = None  # by name only, in checkpoint.py or behind an operator
    if not (composite or traced or checkpoint):
        call = backends.Call(
            x, batch_sizes, h0, weights[0], reset, need_cells, need_reserve=False, train=train
        )
        chosen = backends.pick(backend, call)
        # Of torch's own LSTM transforms know no packed sequences, and cuDNN's has no second order.
        lacks_tangents = forward_mode and chosen.layer_tangent is None
        composite |= lacks_tangents or (transformed and chosen.layer_backward is None)
    given = x
    if chosen is None or not chosen.padded:
        x = packed_rows(x)
    y: Tensor
    cells: Tensor | None
    if transformed and not composite:
        run = Run(need_cells, backend, checkpoint, chosen, train)
        y, h_n, c_n, c_all, *_ = TransformedLayer.apply(run, batch_sizes, reset, x, h0, c0, *flat)
        cells = c_all if need_cells else None
    elif train and not composite and (chosen is None or chosen.layer_backward is not None):
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
        y, cells = shaped(y, given), None if cells is None else shaped(cells, given)
    return y, cells, h_n, c_n


def _has_functions_for_transforms(
    batch_sizes: Tensor, x: Tensor, h0: Tensor, c0: Tensor, flat: Sequence[Tensor | None]
) -> bool:
    """Is ``TransformedLayer`` the way through the transforms under way, or the reference?"""
    if not modes.have_functions():
        return False
    counts = [math.prod(modes.samples_of(t)) for t in (x, h0, c0, *flat)]
    return 0 not in counts and max(counts[3:]) <= batch_sizes.numel() * MODELS_PER_STEP


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
        args = (packed_rows(x), batch_sizes, h0, c0, [w.summed() for w in weights], reset)
        if modes.is_transformed():
            out = reference.layer_forward(*args, True, False)
        else:
            keeper = "auto" if backends.keeps_nothing(backend) else backend
            out = ops.layer_forward(*args, True, False, keeper)
    assert out.gates is not None  # asked for
    return out.gates


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
        out, kept = _forward(run, batch_sizes, reset, x, h0, c0, flat)
        keep(ctx, run, *kept, batch_sizes, reset, x, h0, c0, *flat)
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
        *_: None,  # of TransformedLayer's further results
    ) -> tuple[Any, ...]:
        saved = modes.unwrapped(ctx.saved_tensors)  # once: checkpointing makes them at each look
        kept: type[Borders] | type[Reserve] = Borders if ctx.run.checkpoint else Reserve
        count = len(kept._fields)
        reserve, (batch_sizes, reset, *inputs) = kept(*saved[:count]), saved[count:]
        grads = (dy, dc_all, dh_n, dc_n)
        asked = asked_for(ctx, 3, inputs, grads)
        return (
            None,
            None,
            None,
            *gradients(ctx.run, asked, reserve, batch_sizes, reset, grads, inputs),
        )


class TransformedLayer(LSTMLayer):
    """The same under torch.func's transforms and in forward mode, which have to see all that is
    saved: c_all, be it asked for or not, and the rest of what is kept are among the results."""

    @staticmethod
    @modes.uncompiled
    def forward(
        run: Run,
        batch_sizes: Tensor,
        reset: Tensor | None,
        x: Tensor,
        h0: Tensor,
        c0: Tensor,
        *flat: Tensor | None,
    ) -> tuple[Tensor | None, ...]:
        out, kept = _forward(run, batch_sizes, reset, x, h0, c0, flat)
        given = (out.y, out.h_n, out.c_n, out.c_all)
        if isinstance(kept, Borders):
            return *given, kept.c
        return (*given, kept.gates, kept.m) if kept else given

    @staticmethod
    @modes.uncompiled
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        run, *rest = inputs
        if not run.train:
            return
        y, _, _, c_all, *further = output
        ctx.further = len(further)
        constant = further if run.need_cells else (c_all, *further)
        ctx.mark_non_differentiable(*(t for t in constant if t is not None))
        kept = Borders(y, *further) if run.checkpoint else Reserve(y, c_all, *further)
        keep_transformed(ctx, run, *kept, *rest)

    backward = staticmethod(modes.uncompiled(LSTMLayer.backward))

    @staticmethod
    @modes.uncompiled
    @samples.of_each
    def jvp(ctx: Any, *tangents: Any) -> tuple[Tensor | None, ...]:
        saved = modes.unwrapped(ctx.saved_tensors)
        count = len(Reserve._fields)
        reserve, (batch_sizes, reset, *inputs) = Reserve(*saved[:count]), saved[count:]
        given = (*tangents[3:], *inputs)
        y, cells, h_n, c_n = LayerTangents.apply(ctx.run, reserve, batch_sizes, reset, *given)
        return y, h_n, c_n, cells, *[None] * ctx.further

    @staticmethod
    @modes.uncompiled
    def vmap(
        info: Any,
        in_dims: tuple[Any, ...],
        run: Run,
        batch_sizes: Tensor,
        reset: Tensor | None,
        *inputs: Tensor | None,
    ) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        count, dims = info.batch_size, in_dims[3:]
        if any(dim is not None for dim in dims[3:]):
            args = (run, batch_sizes, reset, *inputs)
            return samples.one_by_one(TransformedLayer.apply, count, in_dims, args)
        states = (samples.folded(t, d, count) for t, d in zip(inputs[:3], dims, strict=False))
        reset = samples.folded(reset, in_dims[2], count, axis=0)
        results = TransformedLayer.apply(run, batch_sizes * count, reset, *states, *inputs[3:])
        further = samples.AXES[Borders][1:] if run.checkpoint else samples.AXES[Reserve][2:]
        axes = (*[-2] * 4, *further)
        pairs = (samples.unfolded(t, count, a) for t, a in zip(results, axes, strict=False))
        tensors, along = zip(*pairs, strict=True)
        return tensors, along


def _forward(
    run: Run,
    batch_sizes: Tensor,
    reset: Tensor | None,
    x: Tensor,
    h0: Tensor,
    c0: Tensor,
    flat: Sequence[Tensor | None],
) -> tuple[Outputs, Reserve | Borders | tuple[()]]:
    """The layer's results, and what to keep of them for training."""
    args = (x, batch_sizes, h0, c0, [w.summed() for w in unflatten(flat)], reset)
    if run.checkpoint and run.train:
        return ops.checkpoint_forward(*args, run.need_cells, run.backend)
    if run.chosen is not None:
        out = run.chosen.layer_forward(*args, run.train, run.need_cells)
    else:
        out = ops.layer_forward(*args, run.train, run.need_cells, run.backend)
    return out, out.reserve() if run.train else ()

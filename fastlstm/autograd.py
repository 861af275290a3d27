"""Differentiation of one layer: what is saved, and second order.

``LSTMLayer`` is the autograd Function over the two operators of ``ops.py``.  Its
backward pass is itself differentiable: the gradient of a gradient is taken through
``reference.layer_forward``, so second order works on every backend.  Under torch.func
transforms and forward-mode differentiation, where an opaque operator would give wrong
or zero tangents, the reference runs instead.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import backends, ops, reference
from .contract import Outputs, Requested, Weights


class _Spec(NamedTuple):
    """What a layer call consists of besides differentiable tensors."""

    batch_sizes: Tensor
    reset: Tensor | None
    need_cells: bool
    backend: str


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
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """Run one layer, differentiably.

    Args:
        x: (N, I) packed rows; float16, bfloat16, float32 or float64.
        batch_sizes: (T,) int64 on the CPU, never increasing; may end in zeros.
        h0, c0: (D, B, P) and (D, B, H) initial states; ``B >= batch_sizes[0]``.
        weights: one ``Weights`` per direction, in ``x``'s dtype and on its device.
        reset: (N,) uint8; 1 marks the first step of a new segment.
        need_cells: also return every cell state.
        backend: a name in ``available_backends()``, or "auto".

    Returns:
        y (N, D*P); every c_t (N, D*H) in ``state_dtype(x.dtype)``, or None; h_n (D, B, P);
        c_n (D, B, H).

    Raises:
        ValueError: an argument does not fit; the message names it.
        RuntimeError: ``backend`` cannot serve this call; the message says why.
    """
    inputs = (x, h0, c0, *(t for w in weights for t in w))
    if _needs_composite():
        out = reference.layer_forward(x, batch_sizes, h0, c0, weights, reset, False, need_cells)
    elif not torch.is_grad_enabled() or not any(t is not None and t.requires_grad for t in inputs):
        out = ops.layer_forward(
            x, batch_sizes, h0, c0, weights, reset, False, need_cells, backend
        )
    elif backends.differentiates_itself(backend, x, batch_sizes, h0, reset, need_cells):
        chosen = backends.pick(backend, x, batch_sizes, h0, reset, need_cells)
        out = chosen.layer_forward(x, batch_sizes, h0, c0, weights, reset, True, need_cells)
    else:
        spec = _Spec(batch_sizes, reset, need_cells, backend)
        y, h_n, c_n, *cells = LSTMLayer.apply(spec, *inputs)
        return y, cells[0] if need_cells else None, h_n, c_n
    assert out.y is not None and out.h_n is not None and out.c_n is not None
    return out.y, out.c_all if need_cells else None, out.h_n, out.c_n


def _needs_composite() -> bool:
    """Is a torch.func transform or forward-mode differentiation under way?"""
    return (
        torch._C._functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0
    )


def _unflatten(flat: Sequence[Tensor | None]) -> list[Weights]:
    """(w_ih, w_hh, bias, w_hr) of each direction in turn, back to ``Weights``."""
    return [Weights(*flat[k : k + 4]) for k in range(0, len(flat), 4)]  # type: ignore[arg-type]


class LSTMLayer(torch.autograd.Function):
    """(spec, x, h0, c0, *flat weights) -> y, h_n, c_n and, if asked for, c_all."""

    @staticmethod
    def forward(ctx: Any, spec: _Spec, x: Tensor, h0: Tensor, c0: Tensor, *flat: Tensor | None):
        out = ops.layer_forward(
            x, spec.batch_sizes, h0, c0, _unflatten(flat), spec.reset, True, spec.need_cells,
            spec.backend,
        )  # fmt: skip
        ctx.set_materialize_grads(False)
        ctx.spec = spec
        ctx.save_for_backward(x, h0, c0, *flat, out.y, out.c_all, out.gates, out.m)
        if spec.need_cells:
            return out.y, out.h_n, out.c_n, out.c_all
        return out.y, out.h_n, out.c_n

    @staticmethod
    def backward(ctx: Any, dy, dh_n, dc_n, dc_all=None):
        spec: _Spec = ctx.spec
        # save_for_backward has noted each tensor's version: this raises for one changed in place.
        *inputs, y, c_all, gates, m = ctx.saved_tensors
        need = _requested(ctx.needs_input_grad[1:])
        grads = (dy, dc_all, dh_n, dc_n)
        return None, *LSTMLayerBackward.apply(spec, need, y, c_all, gates, m, *grads, *inputs)


def _requested(flags: Sequence[bool]) -> Requested:
    """needs_input_grad of (x, h0, c0, *flat weights) by kind."""
    directions = range(3, len(flags), 4)
    return Requested(*flags[:3], *(any(flags[d + k] for d in directions) for k in range(4)))


class LSTMLayerBackward(torch.autograd.Function):
    """The backward pass as a Function, so that it can be differentiated again."""

    @staticmethod
    def forward(ctx: Any, spec: _Spec, need: Requested, y, c_all, gates, m, *tensors):
        grads, (x, h0, c0, *flat) = Outputs(*tensors[:4]), tensors[4:]
        ctx.set_materialize_grads(False)
        ctx.spec = spec
        ctx.save_for_backward(*tensors)
        weights = _unflatten(flat)
        got = ops.layer_backward(
            grads, x, spec.batch_sizes, h0, c0, weights, spec.reset,
            Outputs(y, c_all, None, None, gates, m), need, spec.backend,
        )  # fmt: skip
        by_direction = [
            None if kind is None else kind[d]
            for d in range(len(weights))
            for kind in (got.w_ih, got.w_hh, got.bias, got.w_hr)
        ]
        return got.x, got.h0, got.c0, *by_direction

    @staticmethod
    def backward(ctx: Any, *grads_of_grads: Tensor | None):
        """Second order, by differentiating the reference twice.

        The gradient of <forward(inputs), grads> is what ``forward`` above returned;
        it is linear in ``grads`` and depends on the inputs through the whole layer.
        """
        again = torch.is_grad_enabled()  # third order wanted: keep the graph to the originals
        with torch.enable_grad():
            # Aliases, so that one tensor given for two arguments counts once in each.
            tensors = [
                t if t is None else t.view_as(t) if again else t.detach().requires_grad_(asked)
                for t, asked in zip(ctx.saved_tensors, ctx.needs_input_grad[6:], strict=True)
            ]
            first = _composite_gradients(ctx.spec, tensors)
        pairs = [
            (g, gg)
            for g, gg in zip(first, grads_of_grads, strict=True)
            if g is not None and gg is not None and g.requires_grad
        ]
        wanted = [t for t, asked in zip(tensors, ctx.needs_input_grad[6:], strict=True) if asked]
        second = iter(
            torch.autograd.grad(
                [g for g, _ in pairs], wanted, [gg for _, gg in pairs],
                create_graph=again, allow_unused=True,
            )
            if pairs and wanted
            else [None] * len(wanted)
        )  # fmt: skip
        return (None,) * 6 + tuple(next(second) if n else None for n in ctx.needs_input_grad[6:])


def _composite_gradients(spec: _Spec, tensors: list[Tensor | None]) -> list[Tensor | None]:
    """Gradients of (x, h0, c0, *flat weights) through the reference, with a graph."""
    dy, dc_all, dh_n, dc_n, *inputs = tensors
    x, h0, c0, *flat = inputs
    assert x is not None and h0 is not None and c0 is not None
    out = reference.layer_forward(
        x, spec.batch_sizes, h0, c0, _unflatten(flat), spec.reset, False, spec.need_cells
    )
    pairs = [
        (o, g) for o, g in zip(out[:4], (dy, dc_all, dh_n, dc_n), strict=True) if g is not None
    ]
    at = [k for k, t in enumerate(inputs) if t is not None and t.requires_grad]
    found = torch.autograd.grad(
        [o for o, _ in pairs], [inputs[k] for k in at], [g for _, g in pairs],
        create_graph=True, allow_unused=True,
    ) if pairs else [None] * len(at)  # fmt: skip
    gradients: list[Tensor | None] = [None] * len(inputs)
    for k, g in zip(at, found, strict=True):
        gradients[k] = g
    return gradients



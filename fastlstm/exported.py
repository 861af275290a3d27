"""Backpropagation through the operators of ``ops.py`` themselves.

A program of torch.export has no other: it records the operators, not the autograd Functions around
them.  First order only; a second raises.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import modes, ops


class _Pass(NamedTuple):
    """A forward operator and its backward one, which is given some results of the first."""

    forward: str
    backward: str
    kept: tuple[int, ...]


_PASSES = (
    _Pass("layer_forward", "layer_backward", (0, 1, 4, 5)),  # y, c_all, gates, m
    _Pass("checkpoint_forward", "checkpoint_backward", (0, 4)),  # y, borders
)


class _Differentiated(torch.autograd.Function):
    """(pass, counts of weights by kind, batch_sizes, reset, options, x, h0, c0, *weights by kind)
    -> what the forward operator returns."""

    @staticmethod
    def forward(
        ctx: Any,
        this: _Pass,
        counts: Sequence[int],
        batch_sizes: Tensor,
        reset: Tensor | None,
        options: Sequence[Any],
        *tensors: Tensor,
    ) -> tuple[Tensor, ...]:
        x, h0, c0, *flat = tensors
        operator = getattr(torch.ops.fastlstm, this.forward)
        with modes.below_autograd():
            out = operator(x, batch_sizes, h0, c0, *_by_kind(flat, counts), reset, *options)
        ctx.set_materialize_grads(False)
        ctx.this, ctx.counts, ctx.options = this, counts, options
        ctx.save_for_backward(*(out[k] for k in this.kept), batch_sizes, reset, *tensors)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        this, counts, (*flags, backend) = ctx.this, ctx.counts, ctx.options
        if this.forward == "layer_forward" and not flags[0]:  # need_reserve
            raise RuntimeError("layer_forward kept nothing for a backward pass: traced without one")
        kept, rest = ctx.saved_tensors[: len(this.kept)], ctx.saved_tensors[len(this.kept) :]
        batch_sizes, reset, x, h0, c0, *flat = rest
        asked = ctx.needs_input_grad[5:]
        need = [*asked[:3], *map(any, _by_kind(asked[3:], counts))]
        dx, dh0, dc0, *kinds = getattr(torch.ops.fastlstm, this.backward)(
            *grads[:4], x, batch_sizes, h0, c0, *_by_kind(flat, counts), reset, *kept, need, backend
        )
        weights: list[Tensor | None] = []
        for count, kind in zip(counts, kinds, strict=True):
            weights += kind or [None] * count
        found = zip((dx, dh0, dc0, *weights), asked, strict=True)
        return (None,) * 5 + tuple(t if a else None for t, a in found)


def _by_kind(flat: Sequence[Any], counts: Sequence[int]) -> list[list[Any]]:
    rest = iter(flat)
    return [[next(rest) for _ in range(count)] for count in counts]


def _seen_by_autograd(this: _Pass, *args: Any) -> tuple[Tensor, ...]:
    x, batch_sizes, h0, c0, *lists = args[:8]
    reset, *options = args[8:]
    kinds = [kind or [] for kind in lists]  # AOTInductor has None for an empty list
    tensors = (x, h0, c0, *(tensor for kind in kinds for tensor in kind))
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        counts = tuple(map(len, kinds))
        return _Differentiated.apply(this, counts, batch_sizes, reset, options, *tensors)
    with modes.below_autograd():
        operator = getattr(torch.ops.fastlstm, this.forward)
        return operator(x, batch_sizes, h0, c0, *kinds, reset, *options)


for _pass in _PASSES:
    ops.library.impl(_pass.forward, partial(_seen_by_autograd, _pass), "Autograd")

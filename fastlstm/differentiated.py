"""What differentiates backward passes again: by the kernels, or by what torch differentiates.

``keep_backward`` notes which it will be, when a backward pass is run.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from . import modes, reference, samples
from .contract import Borders, Requested, Reserve
from .gradients import (
    Run,
    at_once,
    differentiable,
    keep,
    keep_transformed,
    layer_results,
    pulled_back,
    wanted_of,
)
from .second_order import HessianProduct, LayerTangents
from .tangents import second_order

# What a layer has kept, batch_sizes and reset.
Saved = tuple[Reserve, Tensor, Tensor | None]


def by_kernels(run: Run, reserve: Reserve | Borders) -> bool:
    """Can this layer be differentiated twice, and forward, by its backend?"""
    has_walks = run.chosen is not None and run.chosen.layer_tangent is not None
    return has_walks and isinstance(reserve, Reserve)


def differentiated_backward(
    run: Run,
    asked: Sequence[bool],
    saved: Saved,
    tangents: Sequence[Tensor | None],
    grads: Sequence[Tensor | None],
    inputs: Sequence[Any],
    again: bool,
) -> Sequence[Tensor | None]:
    """Gradients of what a backward pass was given, ``grads`` of y, c_all, h_n and c_n and
    ``inputs``, as ``asked`` for, from those of what it returned, ``tangents``, of which those of
    weights may be each sample's: with a graph if they are to be differentiated ``again``."""
    if not again:
        assert run.chosen is not None
        return second_order(run.chosen, asked, *saved, tangents, grads, inputs)
    of_grads: Sequence[Tensor | None] = (None,) * 4
    of_inputs: Sequence[Tensor | None] = [None] * len(inputs)
    if any(asked[:4]):
        of_grads = LayerTangents.apply(run, *saved, *tangents, *inputs)
    if any(asked[4:]):
        given = (*tangents, *grads, *inputs)
        of_inputs = HessianProduct.apply(run, tuple(asked[4:]), None, *saved, *given)
    pairs = zip((*of_grads, *of_inputs), asked, strict=True)
    return [t if a else None for t, a in pairs]


def tangents_of_backward(
    run: Run,
    need: Requested,
    each: int | None,
    saved: Saved,
    tangents: Sequence[Tensor | None],
    tensors: Sequence[Any],
) -> Sequence[Tensor | None]:
    """What a backward pass with these ``tensors``, gradients of results and inputs, makes of
    tangents of the inputs alone; of weights for ``each`` of so many samples."""
    asked = tuple(wanted_of(need, tensors[4:]))
    if all(t is None for t in tangents):
        return [None] * len(asked)
    return HessianProduct.apply(run, asked, each, *saved, *tangents, *tensors)


def keep_backward(
    ctx: Any, run: Run, reserve: Reserve | Borders, *tensors: Any, transformed: bool = True
) -> None:
    """Save what differentiates a backward pass: batch_sizes, reset, gradients of results, and
    inputs; where the kernels do it, also what the layer kept."""
    ctx.by_kernels = by_kernels(run, reserve)
    saved = (*(reserve if ctx.by_kernels else ()), *tensors)
    save = keep_transformed if transformed else keep
    save(ctx, run, *saved)


def kept_backward(ctx: Any) -> tuple[Run, Saved, Sequence[Any]]:
    """The same again: what the layer kept, and gradients of results and inputs."""
    saved = modes.unwrapped(ctx.saved_tensors)
    count = len(Reserve._fields)
    return ctx.run, (Reserve(*saved[:count]), *saved[count : count + 2]), saved[count + 2 :]


def differentiated_by_kernels(ctx: Any, grads_of_grads: Sequence[Tensor | None]) -> Sequence[Any]:
    """Gradients of what a backward pass was given, of results and inputs."""
    run, saved, tensors = kept_backward(ctx)
    asked = ctx.needs_input_grad[-len(tensors) :]
    if all(g is None for g in grads_of_grads):
        return [None] * len(tensors)
    again = torch.is_grad_enabled() or modes.is_transformed()

    def differentiated(again: bool, *tangents: Tensor | None) -> Sequence[Tensor | None]:
        given = (tangents, tensors[:4], tensors[4:])
        return differentiated_backward(run, asked, saved, *given, again)

    with modes.without_autocast(tensors[4].device):
        if any(map(modes.is_batched, grads_of_grads)):
            return samples.for_each(partial(differentiated, True), grads_of_grads)
        return differentiated(again, *grads_of_grads)


def differentiated_each(ctx: Any, grads_of_grads: Sequence[Tensor | None]) -> list[Any]:
    """Of ``EachGradients``: what the samples share has the sum of their gradients."""
    if any(map(modes.is_batched, grads_of_grads)):
        return samples.for_each(lambda *given: differentiated_each(ctx, given), grads_of_grads)
    run, saved, tensors = kept_backward(ctx)
    asked = ctx.needs_input_grad[7:]
    counts = [len(g) for g in grads_of_grads if g is not None]
    if not counts:
        return [None] * len(tensors)
    count = counts[0]
    shared = [a and d is None for a, d in zip(asked, ctx.dims[3:], strict=True)]
    size = at_once(count, sum(t.nbytes for t, s in zip(tensors, shared, strict=True) if s))
    results: list[Any] = [None] * len(tensors)

    def alone(own: Saved, tensors: Sequence[Any], moved: Sequence[Any]) -> Any:
        given = (moved, tensors[:4], tensors[4:])
        return differentiated_backward(run, asked, own, *given, again=True)

    with modes.without_autocast(tensors[4].device):
        for start in range(0, count, size):
            part = slice(start, start + size)
            kept = _some((*saved, *tensors), ctx.dims, part)
            moved = [None if g is None else g[part] for g in grads_of_grads]
            along = [None if g is None else 0 for g in grads_of_grads]
            found = each_sample(alone, kept[:3], kept[3:], ctx.dims, moved, along)
            for k, t in enumerate(found):
                if t is not None and shared[k]:
                    results[k] = t.sum(0) if results[k] is None else results[k] + t.sum(0)
                elif t is not None:
                    results[k] = t if results[k] is None else torch.cat((results[k], t))
    return results


def _some(tensors: Any, dims: Any, part: slice) -> Any:
    """Some of the samples that tensors have along dimension 0, if they have any."""
    leaves, spec = pytree.tree_flatten(tensors)
    pairs = zip(leaves, pytree.tree_leaves(dims), strict=True)
    return pytree.tree_unflatten([t if d is None else t[part] for t, d in pairs], spec)


def each_sample(
    function: Callable[..., Sequence[Tensor | None]],
    saved: Saved,
    tensors: Sequence[Any],
    dims: Sequence[Any],
    moved: Sequence[Tensor | None],
    along: Sequence[samples.Dim],
) -> list[Tensor | None]:
    """By vmap, a function of what a layer has saved, the ``tensors`` of a backward pass, gradients
    of results and inputs, and further ones, ``moved``."""
    (reserve, batch_sizes, reset), size = saved, len(tensors)
    count = len(reserve)

    def alone(*given: Any) -> Sequence[Tensor | None]:
        own = (Reserve(*given[:count]), batch_sizes, given[count])
        rest = given[count + 1 :]
        return function(own, rest[:size], rest[size:])

    given = (*reserve, reset, *tensors, *moved)
    return samples.mapped(alone, given, (*dims[0], *dims[2:], *along))


def with_tangents(
    found: Sequence[Tensor | None],
    of_grads: Sequence[Tensor | None],
    backward: Callable[..., Sequence[Tensor | None]],
) -> tuple[Tensor | None, ...]:
    """Tangents of a backward pass, ``found`` from those of its inputs, and what the same pass makes
    of those of the gradients that it was given, if there are any."""
    if all(t is None for t in of_grads):
        return tuple(found)
    pairs = zip(found, backward(*of_grads), strict=True)
    return tuple(b if a is None else a if b is None else a + b for a, b in pairs)


def pulled_back_twice(ctx: Any, grads_of_grads: Sequence[Tensor | None]) -> Sequence[Any]:
    """Second order whatever transforms are under way, or have been: they let no tensor be made a
    leaf, and what they had wrapped may outlive them, so here they differentiate themselves."""
    batch_sizes, reset, *saved = modes.unwrapped(ctx.saved_tensors)
    results = differentiable(ctx.run, batch_sizes, reset, saved[4:], transformed=True)
    wanted = [g is not None for g in grads_of_grads]

    def first(tensors: list[Any]) -> list[Tensor | None]:
        return pulled_back(results, tensors[4:], wanted, tensors[:4])

    with modes.without_autocast(saved[4].device):
        return pulled_back(first, saved, ctx.needs_input_grad[5:], grads_of_grads)


def samples_by_reference(
    run: Run,
    wanted: Sequence[bool],
    batch_sizes: Tensor,
    reset: Tensor | None,
    tensors: Sequence[Any],
    dims: Sequence[samples.Dim],
) -> tuple[tuple[Any, ...], tuple[samples.Dim, ...]]:
    """``wanted`` gradients of samples, by the reference and vmap itself, with their dimensions;
    ``dims`` are those of ``reset`` and of the ``tensors``: gradients of results, and inputs."""

    def pull(reset: Tensor | None, *tensors: Any) -> Sequence[Tensor | None]:
        results = partial(layer_results, run, batch_sizes, reset, reference.layer_forward)
        return pulled_back(results, tensors[4:], wanted, tensors[:4])

    found = samples.mapped(pull, (reset, *tensors), dims)
    return tuple(found), tuple(0 if w else None for w in wanted)

"""Backward passes of one layer: which way they go, and what differentiates them again.

The gradient of a gradient is taken through what torch differentiates by itself
(``backends.differentiable``), so second order works on every backend.  What a transform gives
tangents goes through the reference.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from . import modes, reference, samples
from .contract import Borders, Requested, Reserve
from .gradients import (
    Run,
    aliases,
    composite_gradients,
    differentiable,
    differentiate,
    first_order,
    first_order_of_samples,
    first_order_of_several,
    has_walk,
    keep,
    layer_results,
    pulled_back,
    requested,
    wanted_of,
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
    need, compiling = requested(asked), torch.compiler.is_compiling()
    transformed = modes.is_transformed()
    with modes.without_autocast(inputs[0].device):
        if not compiling and any(map(modes.is_batched, grads)):
            if torch.is_grad_enabled() and not transformed:
                return _graphs_of_several(run, batch_sizes, reset, grads, inputs, asked)
            return _several_gradients(run, asked, reserve, batch_sizes, reset, grads, inputs)
        if transformed:
            if modes.is_differentiated_or_mapped():
                return TransformedBackward.apply(
                    run, need, reserve, batch_sizes, reset, *grads, *inputs
                )
            results = partial(layer_results, run, batch_sizes, reset, reference.layer_forward)
            return pulled_back(results, inputs, asked, grads)
        if torch.is_grad_enabled() or compiling:
            return LSTMLayerBackward.apply(run, need, reserve, batch_sizes, reset, *grads, *inputs)
        # Nobody asks for a graph of it, which would cost time.
        return first_order(run, need, reserve, batch_sizes, reset, grads, inputs)


def _several_gradients(
    run: Run,
    asked: Sequence[bool],
    reserve: Reserve | Borders,
    batch_sizes: Tensor,
    reset: Tensor | None,
    grads: Sequence[Tensor | None],
    inputs: Sequence[Tensor | None],
) -> list[Tensor | None]:
    """For several gradients at once, as ``is_grads_batched=True`` asks for them."""
    level = modes.batching_level(grads)
    if level == 0:
        raise RuntimeError(
            "is_grads_batched=True: got gradients that a torch.func transform wraps, expected none"
        )
    several = [modes.unbatched(g, level) for g in grads]
    (count,) = {len(s) for s in several if s is not None}
    along = [None if s is None else 0 for s in several]
    dims = ([None] * len(reserve), None, None, *along, *[None] * len(inputs))
    given = [g if s is None else s for g, s in zip(grads, several, strict=True)]
    saved = (reserve, batch_sizes, reset)
    if modes.is_transformed() or any(map(modes.is_batched, given)):  # several of several

        def alone(*grads: Tensor | None) -> Sequence[Tensor | None]:
            return gradients(run, asked, *saved, grads, inputs)

        got, _ = samples.one_by_one(alone, count, along, given)
    else:
        got = EachGradients.apply(run, requested(asked), count, dims, *saved, *given, *inputs)
    return [g if g is None else modes.batched(g, level) for g in got]


def _graphs_of_several(
    run: Run,
    batch_sizes: Tensor,
    reset: Tensor | None,
    grads: Sequence[Tensor | None],
    inputs: Sequence[Tensor | None],
    asked: Sequence[bool],
) -> list[Tensor | None]:
    """The same with a graph, through the reference."""
    results = partial(layer_results, run, batch_sizes, reset, reference.layer_forward)
    return composite_gradients(results, grads, aliases(inputs, asked, again=True), asked, True)


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
        keep(ctx, run, batch_sizes, reset, *tensors)
        return first_order(run, need, reserve, batch_sizes, reset, tensors[:4], tensors[4:])

    @staticmethod
    def backward(ctx: Any, *grads_of_grads: Tensor | None) -> tuple[Any, ...]:
        """Second order, by differentiating twice what torch differentiates by itself.

        The gradient of <forward(inputs), grads> is what ``forward`` above returned;
        it is linear in ``grads`` and depends on the inputs through the whole layer.
        """
        if modes.is_transformed():
            return _pulled_back_twice(ctx, grads_of_grads)
        again = torch.is_grad_enabled()  # third order wanted: keep the graph to the originals
        batch_sizes, reset, *saved = ctx.saved_tensors
        asked = ctx.needs_input_grad[5:]
        results = differentiable(ctx.run, batch_sizes, reset, saved[4:])
        made = [g is not None for g in grads_of_grads]
        # An input that a transform wanted, which has ended, has a gradient and may require none.
        leaves = (*asked[:4], *(a or m for a, m in zip(asked[4:], made, strict=True)))
        with modes.without_autocast(saved[4].device):
            with torch.enable_grad():
                tensors = aliases(saved, leaves, again)
                first = composite_gradients(results, tensors[:4], tensors[4:], made, True)
            wanted = [t for t, a in zip(tensors, asked, strict=True) if a]
            second = iter(differentiate(first, wanted, grads_of_grads, create_graph=again))
        return (None,) * 5 + tuple(next(second) if a else None for a in asked)


class TransformedBackward(LSTMLayerBackward):
    """The same for torch.func's ``grad``, ``vjp`` and ``vmap``."""

    @staticmethod
    @modes.uncompiled
    def forward(  # type: ignore[override]
        run: Run,
        need: Requested,
        reserve: Reserve | Borders,
        batch_sizes: Tensor,
        reset: Tensor | None,
        *tensors: Any,
    ) -> tuple[Tensor | None, ...]:
        return first_order(run, need, reserve, batch_sizes, reset, tensors[:4], tensors[4:])

    @staticmethod
    @modes.uncompiled
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        run, _, _, *tensors = inputs
        keep(ctx, run, *tensors)

    @staticmethod
    @modes.uncompiled
    def backward(ctx: Any, *grads_of_grads: Tensor | None) -> tuple[Any, ...]:
        return _pulled_back_twice(ctx, grads_of_grads)

    @staticmethod
    @modes.uncompiled
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
        run, need, *_ = args
        kept, _, _, *dims = in_dims[2:]
        count, weighs = info.batch_size, any(need[3:])
        shared = all(dim is None for dim in kept)  # several gradients of the same results
        if shared or samples.have_own_weights(dims) or (weighs and not has_walk(run)):
            given, along = samples.samples_first(args[2:], in_dims[2:])
            got = EachGradients.apply(run, need, count, along, *given)
            return got, tuple(None if gradient is None else 0 for gradient in got)
        batch = samples.folded_backward(count, in_dims[2:], *args[2:])
        if not weighs:
            got = TransformedBackward.apply(run, need, *batch)
        else:
            got = SampleGradients.apply(run, need, count, *batch)
        return samples.unfolded_gradients(count, got)


class SampleGradients(torch.autograd.Function):
    """The backward pass of samples that share their weights, in one batch (``samples.py``), with
    gradients of weights for each of them.

    (run, need, samples, reserve, batch_sizes, reset, gradients of y, c_all, h_n and c_n, x, h0, c0,
    *flat weights) -> gradients of the last, those of weights as (samples, ...).
    """

    @staticmethod
    @modes.uncompiled
    def forward(
        run: Run,
        need: Requested,
        count: int,
        reserve: Reserve,
        batch_sizes: Tensor,
        reset: Tensor | None,
        *tensors: Any,
    ) -> tuple[Tensor | None, ...]:
        saved = (reserve, batch_sizes, reset, tensors[:4], tensors[4:])
        return first_order_of_samples(run, need, count, *saved)

    @staticmethod
    @modes.uncompiled
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        run, _, count, _, *tensors = inputs
        keep(ctx, run, *tensors)
        ctx.count = count

    @staticmethod
    @modes.uncompiled
    def backward(ctx: Any, *grads_of_grads: Tensor | None) -> tuple[Any, ...]:
        """Second order, by differentiating the reference for all samples at once."""
        batch_sizes, reset, *saved = modes.unwrapped(ctx.saved_tensors)
        run, count, asked = ctx.run, ctx.count, ctx.needs_input_grad[6:]
        wanted = [g is not None for g in grads_of_grads]
        reset, dim = samples.unfolded(reset, count, axis=0)
        sizes = batch_sizes // count

        def first(tensors: list[Any]) -> list[Tensor | None]:
            parts = [samples.unfolded(t, count) for t in tensors[:7]]
            given = [*(t for t, _ in parts), *tensors[7:]]
            dims = [dim, *(d for _, d in parts), *[None] * len(tensors[7:])]
            found, _ = _by_reference(run, wanted, sizes, reset, given, dims)
            return [*(samples.folded(t, 0, count) for t in found[:3]), *found[3:]]

        with modes.without_autocast(saved[4].device):
            return (None,) * 6 + tuple(pulled_back(first, saved, asked, grads_of_grads))

    @staticmethod
    @modes.uncompiled
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
        """Samples of samples are so many more of them."""
        run, need, count, *rest = args
        if samples.have_own_weights(in_dims[6:]):
            return samples.one_by_one(SampleGradients.apply, info.batch_size, in_dims, args)
        batch = samples.folded_backward(info.batch_size, in_dims[3:], *rest)
        got = SampleGradients.apply(run, need, count * info.batch_size, *batch)
        return samples.unfolded_gradients(info.batch_size, got, (count, info.batch_size))


class EachGradients(torch.autograd.Function):
    """The backward pass of samples one by one, such as have weights of their own; or for several
    gradients of the same results, which are samples that share them.

    (run, need, samples, their dimensions in what follows, reserve, batch_sizes, reset, gradients of
    y, c_all, h_n and c_n, x, h0, c0, *flat weights) -> gradients of the last, (samples, ...).
    """

    @staticmethod
    @modes.uncompiled
    def forward(
        run: Run, need: Requested, count: int, dims: tuple[Any, ...], *given: Any
    ) -> tuple[Tensor | None, ...]:
        if count == 0:
            inputs = given[7:]
            asked = zip(inputs, wanted_of(need, inputs), strict=True)
            return tuple(t.new_zeros(0, *t.shape) if ask else None for t, ask in asked)
        if samples.share_all_but_gradients(dims) and (has_walk(run) or not any(need[3:])):
            return first_order_of_several(run, need, count, dims, *given)

        def alone(
            reserve: Reserve | Borders, batch_sizes: Tensor, reset: Tensor | None, *tensors: Any
        ) -> tuple[Tensor | None, ...]:
            grads, inputs = tensors[:4], tensors[4:]
            return first_order(run, need, reserve, batch_sizes, reset, grads, inputs)

        return samples.one_by_one(alone, count, dims, given)[0]

    @staticmethod
    @modes.uncompiled
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        run, _, _, dims, _, *tensors = inputs
        keep(ctx, run, *tensors)
        ctx.dims = dims[2:]

    @staticmethod
    @modes.uncompiled
    def backward(ctx: Any, *grads_of_grads: Tensor | None) -> tuple[Any, ...]:
        """As ``SampleGradients.backward``."""
        batch_sizes, reset, *saved = modes.unwrapped(ctx.saved_tensors)
        wanted = [g is not None for g in grads_of_grads]

        def first(tensors: list[Any]) -> Sequence[Tensor | None]:
            return _by_reference(ctx.run, wanted, batch_sizes, reset, tensors, ctx.dims)[0]

        with modes.without_autocast(saved[4].device):
            asked = ctx.needs_input_grad[7:]
            return (None,) * 7 + tuple(pulled_back(first, saved, asked, grads_of_grads))

    @staticmethod
    @modes.uncompiled
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
        """Several gradients of the same results, several times, are so many more.  Samples that
        share their weights are one batch here too, but for gradients of weights."""
        run, need, count, dims, *given = args
        own = samples.have_own_weights(in_dims[7:])
        shared = samples.share_all_but_gradients(dims)
        if shared and samples.share_all_but_gradients(in_dims[4:]):
            grads = [
                samples.merged(t, info.batch_size, along, count, within)
                for t, along, within in zip(given[3:7], in_dims[7:11], dims[3:7], strict=True)
            ]
            along = (*dims[:3], *(None if g is None else 0 for g in grads), *dims[7:])
            several = (info.batch_size * count, along, *given[:3], *grads, *given[7:])
            got = EachGradients.apply(run, need, *several)
            apart = (g if g is None else g.unflatten(0, (info.batch_size, count)) for g in got)
            return tuple(apart), tuple(None if g is None else 0 for g in got)
        if own or any(need[3:]) or not shared:
            return samples.one_by_one(EachGradients.apply, info.batch_size, in_dims, args)
        batch = samples.folded_backward(info.batch_size, in_dims[4:], *given)
        got = EachGradients.apply(run, need, count, dims, *batch)
        return samples.unfolded_gradients(info.batch_size, got)


def _pulled_back_twice(ctx: Any, grads_of_grads: Sequence[Tensor | None]) -> tuple[Any, ...]:
    """Second order whatever transforms are under way, or have been: they let no tensor be made a
    leaf, and what they had wrapped may outlive them, so here they differentiate themselves."""
    batch_sizes, reset, *saved = modes.unwrapped(ctx.saved_tensors)
    results = differentiable(ctx.run, batch_sizes, reset, saved[4:], transformed=True)
    wanted = [g is not None for g in grads_of_grads]

    def first(tensors: list[Any]) -> list[Tensor | None]:
        return pulled_back(results, tensors[4:], wanted, tensors[:4])

    with modes.without_autocast(saved[4].device):
        asked = ctx.needs_input_grad[5:]
        return (None,) * 5 + tuple(pulled_back(first, saved, asked, grads_of_grads))


def _by_reference(
    run: Run,
    wanted: Sequence[bool],
    batch_sizes: Tensor,
    reset: Tensor | None,
    tensors: Sequence[Any],
    dims: Sequence[samples.Dim],
) -> tuple[tuple[Any, ...], tuple[samples.Dim, ...]]:
    """``wanted`` gradients of samples, by the reference and vmap itself, with their dimensions;
    ``dims`` are those of ``reset`` and of the ``tensors``: gradients of results, and inputs."""

    def pull(reset: Tensor | None, *tensors: Any) -> tuple[Any, ...]:
        results = partial(layer_results, run, batch_sizes, reset, reference.layer_forward)
        found = pulled_back(results, tensors[4:], wanted, tensors[:4])
        return tuple(gradient for gradient in found if gradient is not None)

    found = iter(torch.func.vmap(pull, tuple(dims))(reset, *tensors))
    gradients = tuple(next(found) if w else None for w in wanted)
    return gradients, tuple(0 if w else None for w in wanted)

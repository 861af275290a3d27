"""Backward passes of one layer, as autograd Functions: which way they go.

They are differentiated again by the kernels where the backend has such (``second_order.py``), and
elsewhere through what torch differentiates by itself (``backends.differentiable``), so second order
works on every backend.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from . import modes, reference, samples
from .contract import Borders, Requested, Reserve
from .differentiated import (
    Saved,
    by_kernels,
    differentiated_by_kernels,
    differentiated_each,
    each_sample,
    keep_backward,
    kept_backward,
    pulled_back_twice,
    samples_by_reference,
    tangents_of_backward,
    with_tangents,
)
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
            if torch.is_grad_enabled() and not transformed and not by_kernels(run, reserve):
                return _graphs_of_several(run, batch_sizes, reset, grads, inputs, asked)
            return _several_gradients(run, asked, reserve, batch_sizes, reset, grads, inputs)
        if transformed:
            if modes.have_functions() and (by_kernels(run, reserve) or not modes.is_forward_mode()):
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
        keep_backward(ctx, run, reserve, batch_sizes, reset, *tensors, transformed=False)
        return first_order(run, need, reserve, batch_sizes, reset, tensors[:4], tensors[4:])

    @staticmethod
    def backward(ctx: Any, *grads_of_grads: Tensor | None) -> tuple[Any, ...]:
        """Second order: by the kernels, or by differentiating twice what torch differentiates by
        itself.

        The gradient of <forward(inputs), grads> is what ``forward`` above returned;
        it is linear in ``grads`` and depends on the inputs through the whole layer.
        """
        if ctx.by_kernels or modes.is_transformed():
            return _differentiated(ctx, grads_of_grads)
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


def _differentiated(ctx: Any, grads_of_grads: Sequence[Tensor | None]) -> tuple[Any, ...]:
    way = differentiated_by_kernels if ctx.by_kernels else pulled_back_twice
    return (None,) * 5 + tuple(way(ctx, grads_of_grads))


class TransformedBackward(LSTMLayerBackward):
    """The same for torch.func's transforms and forward mode."""

    @staticmethod
    @modes.uncompiled
    def forward(
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
        run, ctx.need, reserve, *tensors = inputs
        keep_backward(ctx, run, reserve, *tensors)

    @staticmethod
    @modes.uncompiled
    def backward(ctx: Any, *grads_of_grads: Tensor | None) -> tuple[Any, ...]:
        return _differentiated(ctx, grads_of_grads)

    @staticmethod
    @modes.uncompiled
    @samples.of_each
    def jvp(ctx: Any, *tangents: Any) -> tuple[Tensor | None, ...]:
        run, saved, tensors = kept_backward(ctx)
        of_grads, of_inputs = tangents[5:9], tangents[9:]
        found = tangents_of_backward(run, ctx.need, None, saved, of_inputs, tensors)

        def backward(*grads: Tensor | None) -> Any:
            return TransformedBackward.apply(run, ctx.need, *saved, *grads, *tensors[4:])

        return with_tangents(found, of_grads, backward)

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
        run, ctx.need, ctx.count, reserve, *tensors = inputs
        keep_backward(ctx, run, reserve, *tensors)

    @staticmethod
    @modes.uncompiled
    @samples.of_each
    def jvp(ctx: Any, *tangents: Any) -> tuple[Tensor | None, ...]:
        run, saved, tensors = kept_backward(ctx)
        of_grads, of_inputs = tangents[6:10], tangents[10:]
        found = tangents_of_backward(run, ctx.need, ctx.count, saved, of_inputs, tensors)

        def backward(*grads: Tensor | None) -> Any:
            return SampleGradients.apply(run, ctx.need, ctx.count, *saved, *grads, *tensors[4:])

        return with_tangents(found, of_grads, backward)

    @staticmethod
    @modes.uncompiled
    def backward(ctx: Any, *grads_of_grads: Tensor | None) -> tuple[Any, ...]:
        """Second order: by the kernels, or by differentiating the reference for all samples."""
        if ctx.by_kernels:
            return (None,) * 6 + tuple(differentiated_by_kernels(ctx, grads_of_grads))
        batch_sizes, reset, *saved = modes.unwrapped(ctx.saved_tensors)
        run, count, asked = ctx.run, ctx.count, ctx.needs_input_grad[6:]
        wanted = [g is not None for g in grads_of_grads]
        reset, dim = samples.unfolded(reset, count, axis=0)
        sizes = batch_sizes // count

        def first(tensors: list[Any]) -> list[Tensor | None]:
            parts = [samples.unfolded(t, count) for t in tensors[:7]]
            given = [*(t for t, _ in parts), *tensors[7:]]
            dims = [dim, *(d for _, d in parts), *[None] * len(tensors[7:])]
            found, _ = samples_by_reference(run, wanted, sizes, reset, given, dims)
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
        run, ctx.need, _, dims, reserve, *tensors = inputs
        keep_backward(ctx, run, reserve, *tensors)
        ctx.dims = dims

    @staticmethod
    @modes.uncompiled
    @samples.of_each
    def jvp(ctx: Any, *tangents: Any) -> tuple[Tensor | None, ...]:
        run, saved, tensors = kept_backward(ctx)
        moved = tangents[7:]

        def alone(own: Saved, tensors: Sequence[Any], moved: Sequence[Any]) -> Any:
            found = tangents_of_backward(run, ctx.need, None, own, moved[4:], tensors)

            def backward(*grads: Tensor | None) -> Any:
                return TransformedBackward.apply(run, ctx.need, *own, *grads, *tensors[4:])

            return with_tangents(found, moved[:4], backward)

        along = [d if t is not None else None for t, d in zip(moved, ctx.dims[3:], strict=True)]
        return tuple(each_sample(alone, saved, tensors, ctx.dims, moved, along))

    @staticmethod
    @modes.uncompiled
    def backward(ctx: Any, *grads_of_grads: Tensor | None) -> tuple[Any, ...]:
        """As ``SampleGradients.backward``."""
        if ctx.by_kernels:
            return (None,) * 7 + tuple(differentiated_each(ctx, grads_of_grads))
        batch_sizes, reset, *saved = modes.unwrapped(ctx.saved_tensors)
        wanted = [g is not None for g in grads_of_grads]

        def first(tensors: list[Any]) -> Sequence[Tensor | None]:
            given = (batch_sizes, reset, tensors, ctx.dims[2:])
            return samples_by_reference(ctx.run, wanted, *given)[0]

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

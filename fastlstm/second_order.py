"""Second order and forward mode by the kernels, as autograd Functions.

``LayerTangents`` makes J v, ``HessianProduct`` the gradient of <u, J v> with respect to the inputs
(``tangents.py`` has the letters): all that second order and forward mode are made of.  What
differentiates them again, third order, goes through what torch differentiates by itself.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from . import modes, samples
from .contract import Reserve
from .gradients import (
    Run,
    differentiable,
    keep_transformed,
    pulled_back,
    pushed_forward,
    samples_at_once,
)
from .tangents import hessian_product, layer_tangents


class LayerTangents(torch.autograd.Function):
    """(run, reserve, batch_sizes, reset, tangents of x, h0, c0 and the flat weights, and these)
    -> tangents of y, c_all (if asked for: ``run.need_cells``), h_n and c_n.

    Tangents of weights may be each sample's: (samples, ...), see ``steps.apart``.
    """

    @staticmethod
    @modes.uncompiled
    def forward(
        run: Run,
        reserve: Reserve,
        batch_sizes: Tensor,
        reset: Tensor | None,
        *tensors: Any,
    ) -> tuple[Tensor | None, ...]:
        assert run.chosen is not None  # by_kernels was asked
        half = len(tensors) // 2
        given = (reserve, batch_sizes, reset, tensors[:half], tensors[half:])
        with modes.without_autocast(tensors[half].device):
            y, c_all, h_n, c_n = layer_tangents(run.chosen, *given)
        return y, c_all if run.need_cells else None, h_n, c_n

    @staticmethod
    @modes.uncompiled
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        run, _, *tensors = inputs
        keep_transformed(ctx, run, *tensors)

    @staticmethod
    @modes.uncompiled
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        batch_sizes, reset, *tensors = modes.unwrapped(ctx.saved_tensors)
        with modes.without_autocast(tensors[len(tensors) // 2].device):
            function = partial(_pushed, ctx.run, batch_sizes, reset)
            asked = ctx.needs_input_grad[4:]
            return (None,) * 4 + tuple(pulled_back(function, tensors, asked, grads))

    @staticmethod
    @modes.uncompiled
    @samples.of_each
    def jvp(ctx: Any, *tangents: Any) -> tuple[Tensor | None, ...]:
        batch_sizes, reset, *tensors = modes.unwrapped(ctx.saved_tensors)
        function = partial(_pushed, ctx.run, batch_sizes, reset)
        return tuple(pushed_forward(function, tensors, tangents[4:]))

    @staticmethod
    @modes.uncompiled
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
        size = (len(args) - 4) // 2
        if info.batch_size == 0:
            cells = args[1].c_all if args[0].need_cells else None
            like = (args[1].y, cells, *args[1 - size : 3 - size])
            return samples.none_of(like, (*in_dims[1][:2], *in_dims[1 - size : 3 - size]))
        if any(dim is not None for dim in in_dims[-size + 3 :]):
            return samples.one_by_one(LayerTangents.apply, info.batch_size, in_dims, args)

        def together(_: int, *batch: Any) -> Any:
            return LayerTangents.apply(args[0], *batch)

        return _in_batches(together, info.batch_size, None, in_dims[1:], args[1:], size, 4, 1)


class HessianProduct(torch.autograd.Function):
    """(run, asked, each, reserve, batch_sizes, reset, tangents of x, h0, c0 and the flat weights,
    gradients of y, c_all, h_n and c_n, x, h0, c0, *flat weights) -> the gradient of <u, J v> with
    respect to the last, as ``asked`` for; of weights for ``each`` of so many samples, if not None.
    """

    @staticmethod
    @modes.uncompiled
    def forward(
        run: Run,
        asked: tuple[bool, ...],
        each: int | None,
        reserve: Reserve,
        batch_sizes: Tensor,
        reset: Tensor | None,
        *tensors: Any,
    ) -> tuple[Tensor | None, ...]:
        assert run.chosen is not None  # by_kernels was asked
        tangents, grads, inputs = _split(tensors, len(asked))
        saved = (reserve, batch_sizes, reset)
        with modes.without_autocast(inputs[0].device):
            return hessian_product(run.chosen, asked, each, *saved, tangents, grads, inputs)

    @staticmethod
    @modes.uncompiled
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        run, ctx.asked, ctx.each, _, *tensors = inputs
        keep_transformed(ctx, run, *tensors)

    @staticmethod
    @modes.uncompiled
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        batch_sizes, reset, *tensors = modes.unwrapped(ctx.saved_tensors)
        with modes.without_autocast(tensors[len(ctx.asked) + 4].device):
            function = partial(_hessian_product, ctx, batch_sizes, reset)
            asked = ctx.needs_input_grad[6:]
            return (None,) * 6 + tuple(pulled_back(function, tensors, asked, grads))

    @staticmethod
    @modes.uncompiled
    @samples.of_each
    def jvp(ctx: Any, *tangents: Any) -> tuple[Tensor | None, ...]:
        batch_sizes, reset, *tensors = modes.unwrapped(ctx.saved_tensors)
        function = partial(_hessian_product, ctx, batch_sizes, reset)
        return tuple(pushed_forward(function, tensors, tangents[6:]))

    @staticmethod
    @modes.uncompiled
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
        run, asked, each = args[:3]
        size, count = len(asked), info.batch_size
        if count == 0:
            one = [t if a else None for t, a in zip(args[-size:], asked, strict=True)]
            return samples.none_of(one, in_dims[-size:], [None] * 3 + [each] * (size - 3))
        if any(dim is not None for dim in in_dims[-size + 3 :]):
            return samples.one_by_one(HessianProduct.apply, count, in_dims, args)
        together = partial(HessianProduct.apply, run, asked)
        return _in_batches(together, count, each, in_dims[3:], args[3:], size, 3, 4)


def _split(tensors: Sequence[Any], size: int) -> tuple[Any, Any, Any]:
    """Tangents of so many inputs, gradients of y, c_all, h_n and c_n, and the inputs."""
    return tensors[:size], tensors[size : size + 4], tensors[size + 4 :]


# ---- samples that share their weights ------------------------------------------------------------


def _in_batches(
    function: Callable[..., Sequence[Tensor | None]],
    count: int,
    each: int | None,
    dims: Any,
    args: Any,
    size: int,
    rows: int,
    made: int,
) -> tuple[tuple[Any, ...], tuple[samples.Dim, ...]]:
    """The function's results for so many samples, in as few batches as there is room for.

    Args:
        function: of the number of samples of a batch, and of what is in ``args``.
        each: so many samples are in each of these already, or None.
        args: reserve, batch_sizes, reset, tangents of the inputs, gradients of results or none, and
            the inputs, of which there are ``size``; ``dims`` says where they have their samples.
        rows: so many of the first results have sequences; the others are of weights.
        made: how many tensors as large as the gates it takes.
    """
    (reserve, batch_sizes, reset, *tensors), (kept, _, reset_dim, *along) = args, dims
    inputs = len(tensors) - size
    pairs = zip((*reserve, *tensors[inputs:]), (*kept, *along[inputs:]), strict=True)
    one = [t if t is None or d is None else t.select(d, 0) for t, d in pairs]
    kept_of_one, (x, h0, c0) = Reserve(*one[:4]), one[4:7]
    at_once = samples_at_once(count, kept_of_one, x, h0, c0, made)
    results: list[list[Tensor | None]] = []
    for start in range(0, count, at_once):
        part = min(at_once, count - start)

        def own(t: Any, dim: samples.Dim, start: int = start, part: int = part) -> Any:
            return t if t is None or dim is None else t.narrow(dim, start, part)

        saved = (
            samples.folded(own(t, d), d, part, axis)
            for t, d, axis in zip(reserve, kept, samples.AXES[Reserve], strict=True)
        )
        given = list(tensors)
        for k, (t, d) in enumerate(zip(tensors, along, strict=True)):
            if 3 <= k < size:
                given[k] = _merged(own(t, d), d, part, tensors[inputs + k])
            elif k < inputs + 3:
                given[k] = samples.folded(own(t, d), d, part)
        cuts = samples.folded(own(reset, reset_dim), reset_dim, part, axis=0)
        total = part * (each or 1)
        found = function(total, Reserve(*saved), batch_sizes * part, cuts, *given)
        first = [_samples_first(t, part, each, k < rows) for k, t in enumerate(found)]
        results.append(first)
    together = tuple(map(samples.joined, zip(*results, strict=True)))
    return together, tuple(None if t is None else 0 for t in together)


def _merged(tangent: Any, dim: samples.Dim, count: int, weight: Any) -> Any:
    """Tangents of a weight, of so many samples along ``dim``: as (count, ...); where they are each
    sample's already, (samples, ...), as (samples * count, ...)."""
    if tangent is None:
        return None
    if tangent.dim() - (dim is not None) == weight.dim():
        return tangent if dim is None else tangent.movedim(dim, 0)
    if dim is None:
        return tangent.repeat_interleave(count, 0)
    return tangent.movedim(dim, 1).flatten(0, 1)


def _samples_first(
    result: Tensor | None, count: int, each: int | None, has_sequences: bool
) -> Tensor | None:
    """A batch's result as (count, ...)."""
    if result is None:
        return None
    if has_sequences:
        apart, dim = samples.unfolded(result, count)
        return apart.movedim(dim, 0)
    return result if each is None else result.unflatten(0, (each, count)).movedim(1, 0)


# ---- third order ---------------------------------------------------------------------------------


def _pushed(
    run: Run, batch_sizes: Tensor, reset: Tensor | None, tensors: list[Any]
) -> list[Tensor | None]:
    """J v, from v and the inputs, by what torch differentiates twice."""
    half = len(tensors) // 2

    def one(batch_sizes: Tensor, reset: Tensor | None, tensors: Sequence[Any]) -> Any:
        results = differentiable(run, batch_sizes, reset, tensors[half:], transformed=True)
        return pushed_forward(results, tensors[half:], tensors[:half])

    return _of_samples(one, None, batch_sizes, reset, tensors, half, rows=4)


def _hessian_product(
    ctx: Any, batch_sizes: Tensor, reset: Tensor | None, tensors: list[Any]
) -> list[Tensor | None]:
    """The gradient of <u, J v>, as that of <v, J^T u>, by what torch differentiates twice."""
    size, asked = len(ctx.asked), ctx.asked

    def one(batch_sizes: Tensor, reset: Tensor | None, tensors: Sequence[Any]) -> Any:
        tangents, grads, inputs = _split(tensors, size)
        results = differentiable(ctx.run, batch_sizes, reset, inputs, transformed=True)
        made = [t is not None for t in tangents]
        first = partial(pulled_back, results, asked=made, grads=grads)
        return pulled_back(first, inputs, asked, tangents)

    return _of_samples(one, ctx.each, batch_sizes, reset, tensors, size, rows=3)


def _of_samples(
    function: Callable[..., Sequence[Tensor | None]],
    each: int | None,
    batch_sizes: Tensor,
    reset: Tensor | None,
    tensors: Sequence[Any],
    size: int,
    rows: int,
) -> list[Tensor | None]:
    """A function of batch_sizes, reset and tensors, of the samples of a batch where these have
    weights' tangents, or ``each`` is to have gradients, of their own; else of the batch.

    The other arguments as of ``_in_batches``.
    """
    weights, inputs = tensors[3 - size :], len(tensors) - size
    own = [
        v is not None and v.dim() > w.dim() for v, w in zip(tensors[3:size], weights, strict=True)
    ]
    counts = [len(v) for v, o in zip(tensors[3:size], own, strict=True) if o]
    if each is None and not counts:
        return list(function(batch_sizes, reset, tensors))
    count = max((each or 1, *counts))  # (what is each one's may be that of several samples)
    given: list[Any] = []
    dims: list[samples.Dim] = []
    for k, tensor in enumerate(tensors):
        found: tuple[Any, samples.Dim] = (tensor, None)
        if k < 3 or size <= k < inputs + 3:
            found = samples.unfolded(tensor, count)
        elif k < size and own[k - 3]:
            found = tensor.repeat(count // len(tensor), *[1] * (tensor.dim() - 1)), 0
        given.append(found[0])
        dims.append(found[1])

    def alone(reset: Tensor | None, *tensors: Any) -> Sequence[Tensor | None]:
        return function(batch_sizes // count, reset, list(tensors))

    cuts, dim = samples.unfolded(reset, count, axis=0)
    results = samples.mapped(alone, (cuts, *given), (dim, *dims))
    together = [samples.folded(t, 0, count) for t in results[:rows]]
    sums = [t if t is None else t.unflatten(0, (-1, each or 1)).sum(0) for t in results[rows:]]
    return together + [t if t is None or each else t.squeeze(0) for t in sums]

"""Gradients of one layer as functions: by its backend, or by what torch differentiates.

``backward.py`` makes backward passes of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from . import backends, modes, ops, products, reference, samples
from .contract import (
    Borders,
    Gradients,
    OutputGradients,
    Outputs,
    Requested,
    Reserve,
    Weights,
    state_dtype,
)

# Of a layer's copies at a time, where several gradients are asked for at once.
_SEVERAL_BYTES = 32 << 20

# Multiply-adds of gradients of weights that take longer than to ask whether anybody wants them.
_WORTH_ASKING = 1 << 21


@dataclass(frozen=True)  # which transforms take for one thing, and not apart at every level
class Run:
    """What a layer call consists of besides tensors."""

    need_cells: bool
    backend: str
    checkpoint: bool
    chosen: backends.Backend | None = None  # what ``backend`` came to, where it was called directly
    train: bool = True  # keep what a backward pass needs?


# From a layer's inputs, (x, h0, c0, *flat weights), to its results (y, c_all, h_n, c_n); or from
# the gradients of these and the inputs to the gradients of the inputs.
Function = Callable[[list[Any]], Sequence[Tensor | None]]


def unflatten(flat: Sequence[Tensor | None]) -> list[Weights]:
    """The fields of each direction's ``Weights`` in turn, back to those."""
    size = len(Weights._fields)
    return [Weights(*flat[k : k + size]) for k in range(0, len(flat), size)]  # type: ignore[arg-type]


def requested(flags: Sequence[bool]) -> Requested:
    """needs_input_grad of (x, h0, c0, *flat weights) by kind."""
    size = len(Weights._fields)
    here, *other = (flags[k : k + size] for k in range(3, len(flags), size))
    for there in other:
        here = tuple(a or b for a, b in zip(here, there, strict=True))
    w_ih, w_hh, bias, w_hr, b_hh = here
    x, h0, c0 = flags[:3]
    return Requested(x, h0, c0, w_ih, w_hh, bias or b_hh, w_hr)


def asked_for(
    ctx: Any, first: int, inputs: Sequence[Any], grads: Sequence[Tensor | None]
) -> tuple[bool, ...]:
    """Which of a layer's ``inputs``, (x, h0, c0, *flat weights), are to have a gradient of what has
    ``grads``: those that require one, but weights only if somebody wants theirs.  ``first`` is the
    number of x among the Function's arguments."""
    flags = tuple(ctx.needs_input_grad[first:])
    if torch.compiler.is_compiling():
        return flags
    x, _, _, w_ih, w_hh, *_ = inputs
    work = x.numel() // max(1, x.size(-1)) * (w_ih.numel() + w_hh.numel())
    little = work < _WORTH_ASKING and not any(map(modes.is_batched, grads))
    if little or modes.wants(ctx, first + 3):
        return flags
    return (*flags[:3], *[False] * len(flags[3:]))


def wanted_of(need: Requested, inputs: Sequence[Any]) -> list[bool]:
    """The inverse of ``requested``: which of (x, h0, c0, *flat weights) have such a gradient."""
    x, h0, c0, w_ih, w_hh, bias, w_hr = need
    direction = (w_ih, w_hh, bias, w_hr, bias)
    kinds = (x, h0, c0, *direction * (len(inputs) // len(direction)))
    return [kind and t is not None for kind, t in zip(kinds, inputs, strict=True)]


def first_order(
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
    return flat_gradients(got, weights)


def has_walk(run: Run) -> bool:
    """Can there be gradients of weights for each sample of a batch?"""
    return run.chosen is not None and run.chosen.layer_walk is not None


def first_order_of_samples(
    run: Run,
    need: Requested,
    count: int,
    reserve: Reserve | Borders,
    batch_sizes: Tensor,
    reset: Tensor | None,
    grads: Sequence[Tensor | None],
    inputs: Sequence[Any],
) -> tuple[Tensor | None, ...]:
    """As ``first_order``, but gradients of weights for each of so many samples in a batch
    (``samples.py``), as (samples, ...)."""
    assert run.chosen is not None and run.chosen.layer_walk is not None  # has_walk was asked
    assert isinstance(reserve, Reserve)
    x, h0, c0, *flat = inputs
    weights, output_grads = unflatten(flat), OutputGradients(*grads)
    walked = run.chosen.layer_walk(output_grads, batch_sizes, c0, weights, reset, reserve, need)
    saved = reserve._replace(y=packed_rows(reserve.y))
    rows = (packed_rows(x), batch_sizes, h0, weights, reset, saved, need)
    got = products.sample_gradients(count, walked, *rows)
    return flat_gradients(got._replace(x=None if got.x is None else shaped(got.x, x)), weights)


def first_order_of_several(
    run: Run,
    need: Requested,
    count: int,
    dims: Sequence[Any],
    reserve: Reserve | Borders,
    batch_sizes: Tensor,
    reset: Tensor | None,
    *tensors: Any,
) -> tuple[Tensor | None, ...]:
    """(count, ...) gradients of (x, h0, c0, *flat weights) for each of several gradients of the
    same results, which come first in ``tensors`` and may have the several ones along dimension 0.

    So many together are samples that share everything else, of which each needs a copy.
    """
    size = samples_at_once(count, reserve, *tensors[4:7])
    results: list[Any] = []
    for start in range(0, count, size):
        part = min(size, count - start)
        own = (
            t if d is None else t[start : start + part]
            for t, d in zip(tensors, dims[3:], strict=True)
        )
        batch = samples.folded_backward(part, dims, reserve, batch_sizes, reset, *own)
        saved = (*batch[:3], batch[3:7], batch[7:])
        if any(need[3:]):
            got = first_order_of_samples(run, need, part, *saved)
        else:
            got = first_order(run, need, *saved)
        pairs = zip(*samples.unfolded_gradients(part, got), strict=True)
        found = [t if t is None else t.movedim(d, 0) for t, d in pairs]
        if part == count:
            return tuple(found)
        results = results or [t if t is None else t.new_empty(count, *t.shape[1:]) for t in found]
        for result, t in zip(results, found, strict=True):
            if result is not None:
                result[start : start + part] = t
    return tuple(results)


def samples_at_once(
    count: int, reserve: Reserve | Borders, x: Tensor, h0: Tensor, c0: Tensor, made: int = 1
) -> int:
    """Of so many samples, with these of one, how many to copy what they share for at a time, if so
    many tensors as large as the gates are ``made``: their gradients, to begin with."""
    given = sum(t.nbytes for t in (*reserve, x, h0, c0) if t is not None)
    # With borders alone a chunk's gates are made too.
    rows = x.numel() // max(1, x.size(-1))
    if isinstance(reserve, Borders):
        rows = 2 * rows // max(1, len(reserve.c) - 1)
    gates = rows * c0.size(0) * 4 * c0.size(2) * state_dtype(x.dtype).itemsize
    return at_once(count, given + made * gates)


def at_once(count: int, bytes_of_one: int) -> int:
    """Of so many samples, how many to have in memory at a time."""
    return max(1, min(count, _SEVERAL_BYTES // max(1, bytes_of_one)))


def flat_gradients(got: Gradients, weights: Sequence[Weights]) -> tuple[Tensor | None, ...]:
    """Gradients in the order of (x, h0, c0, *flat weights)."""
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


def differentiable(
    run: Run,
    batch_sizes: Tensor,
    reset: Tensor | None,
    inputs: Sequence[Any],
    transformed: bool = False,
) -> Function:
    """``layer_results`` by what is best differentiated more than once, where no kernels do it."""
    x, h0, _, *flat = inputs
    rows = packed_rows(x)
    forward = reference.layer_forward
    # Of torch's own LSTM transforms know no vmap, no tracing and no packed sequences.
    full = len(rows) == batch_sizes.numel() * h0.size(1)
    if not transformed or (full and modes.is_differentiated() and not modes.is_traced(x)):
        weights = unflatten(flat)[0]
        call = backends.Call(rows, batch_sizes, h0, weights, reset, run.need_cells, False)
        forward = backends.differentiable(call).layer_forward
    return partial(layer_results, run, batch_sizes, reset, forward)


def layer_results(
    run: Run,
    batch_sizes: Tensor,
    reset: Tensor | None,
    forward: Callable[..., Outputs],
    inputs: list[Any],
) -> list[Tensor | None]:
    """y, c_all, h_n and c_n from (x, h0, c0, *flat weights), by a ``forward`` that torch
    differentiates."""
    x, h0, c0, *flat = inputs
    weights = [w.summed() for w in unflatten(flat)]
    out = forward(packed_rows(x), batch_sizes, h0, c0, weights, reset, False, run.need_cells)
    return [*(r if r is None else shaped(r, x) for r in (out.y, out.c_all)), out.h_n, out.c_n]


def pulled_back(
    function: Function,
    tensors: Sequence[Any],
    asked: Sequence[bool],
    grads: Sequence[Tensor | None],
) -> list[Tensor | None]:
    """Gradients of those ``tensors`` that are ``asked`` for, from those of the function's results,
    whatever transforms are under way."""
    if not any(asked) or all(g is None for g in grads):
        return [None] * len(asked)

    def with_gradients(*given: Tensor) -> list[Tensor | None]:
        rest = iter(given)
        results = function([next(rest) if a else t for t, a in zip(tensors, asked, strict=True)])
        return [r for r, g in zip(results, grads, strict=True) if g is not None]

    wanted = (t for t, a in zip(tensors, asked, strict=True) if a)
    pull: Any = torch.func.vjp(with_gradients, *wanted)[1]
    found = iter(pull([g for g in grads if g is not None]))
    return [next(found) if a else None for a in asked]


def pushed_forward(
    function: Function, tensors: Sequence[Any], tangents: Sequence[Tensor | None]
) -> list[Tensor | None]:
    """Tangents of the function's results from those of ``tensors``, None for zero, whatever
    transforms are under way: as J v is the gradient of <v, J^T u> with respect to u, since
    forward mode can't be nested everywhere."""
    there: list[bool] = []

    def of_moved(*given: Tensor) -> list[Tensor]:
        rest = iter(given)
        moved = [t if v is None else next(rest) for t, v in zip(tensors, tangents, strict=True)]
        results = function(moved)
        there[:] = [r is not None for r in results]
        return [r for r in results if r is not None]

    moving = (t for t, v in zip(tensors, tangents, strict=True) if v is not None)
    vjp: Any = torch.func.vjp
    results, pull = vjp(of_moved, *moving)
    push = vjp(lambda *u: pull(list(u)), *map(torch.zeros_like, results))[1]
    rest = iter(push(tuple(v for v in tangents if v is not None)))
    return [next(rest) if t else None for t in there]


def composite_gradients(
    results: Function,
    grads: Sequence[Tensor | None],
    inputs: list[Any],
    asked: Sequence[bool],
    create_graph: bool,
) -> list[Tensor | None]:
    """Gradients of those ``inputs`` that are ``asked`` for, from those of their ``results``."""
    leaves = [t for t, ask in zip(inputs, asked, strict=True) if ask]
    found = iter(differentiate(results(inputs), leaves, grads, create_graph))
    return [next(found) if ask else None for ask in asked]


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


def aliases(tensors: Sequence[Tensor | None], asked: Sequence[bool], again: bool) -> list[Any]:
    """Of each tensor one of its own, so that one given for two arguments counts once in each;
    with the graph that leads to it, if there is one and it is to be differentiated ``again``."""

    def alias(tensor: Tensor | None, ask: bool) -> Tensor | None:
        if tensor is None:
            return None
        if again and tensor.requires_grad:
            return tensor.view_as(tensor)
        return tensor.detach().requires_grad_(ask)

    return list(map(alias, tensors, asked))


def keep(ctx: Any, run: Run, *tensors: Tensor | None) -> None:
    """What a backward pass needs: saved this way, a tensor that is changed in place before it is
    noticed."""
    ctx.set_materialize_grads(False)
    ctx.run = run
    ctx.save_for_backward(*tensors)


def keep_transformed(ctx: Any, run: Run, *tensors: Tensor | None) -> None:
    """The same for transforms, which push tangents forward too, and run in inference mode."""
    saved = [t.clone() if t is not None and t.is_inference() else t for t in tensors]
    keep(ctx, run, *saved)
    ctx.save_for_forward(*saved)


def packed_rows(values: Tensor) -> Tensor:
    """(T, B, size) as packed rows."""
    return values.flatten(0, 1) if values.dim() == 3 else values


def shaped(rows: Tensor, like: Tensor) -> Tensor:
    """The inverse of ``packed_rows``: packed rows in the form of ``like``."""
    return rows.unflatten(0, like.shape[:2]) if like.dim() == 3 else rows

"""Gradients of one layer: by its backend, by torch where they are to be differentiated again.

The gradient of a gradient is taken through what torch differentiates by itself
(``backends.differentiable``), so second order works on every backend.  What a transform has
batched, or gives tangents, goes through the reference.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import backends, modes, ops, products, reference, samples
from .contract import Borders, Gradients, OutputGradients, Outputs, Requested, Reserve, Weights


class Run(NamedTuple):
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
        if modes.is_transformed():
            if modes.is_differentiated_or_mapped():
                return TransformedBackward.apply(
                    run, need, reserve, batch_sizes, reset, *grads, *inputs
                )
            results = partial(_results, run, batch_sizes, reset, reference.layer_forward)
            return _pulled_back(results, inputs, asked, grads)
        if not compiling and any(map(modes.is_batched, grads)):
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
    return _flat(got, weights)


def _flat(got: Gradients, weights: Sequence[Weights]) -> tuple[Tensor | None, ...]:
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


def _batched_gradients(
    run: Run,
    batch_sizes: Tensor,
    reset: Tensor | None,
    grads: Sequence[Tensor | None],
    inputs: Sequence[Tensor | None],
    asked: Sequence[bool],
) -> list[Tensor | None]:
    """Through the reference, for several gradients at once."""
    again = torch.is_grad_enabled()
    results = partial(_results, run, batch_sizes, reset, reference.layer_forward)
    with torch.enable_grad():
        return _composite_gradients(results, grads, aliases(inputs, asked, again), again)


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
        keep(ctx, run, batch_sizes, reset, *tensors)
        return _first_order(run, need, reserve, batch_sizes, reset, tensors[:4], tensors[4:])

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
        results = _differentiable(ctx.run, batch_sizes, reset, saved[4:])
        # An input that a transform wanted, which has ended, has a gradient and may require none.
        first_asked = (a or g is not None for a, g in zip(asked[4:], grads_of_grads, strict=True))
        with modes.without_autocast(saved[4].device):
            with torch.enable_grad():
                tensors = aliases(saved, (*asked[:4], *first_asked), again)
                first = _composite_gradients(results, tensors[:4], tensors[4:], True)
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
        return _first_order(run, need, reserve, batch_sizes, reset, tensors[:4], tensors[4:])

    @staticmethod
    @modes.uncompiled
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        run, _, _, *tensors = inputs
        keep(ctx, run, *tensors)

    @staticmethod
    @modes.uncompiled
    def vmap(
        info: Any,
        in_dims: tuple[Any, ...],
        run: Run,
        need: Requested,
        reserve: Reserve | Borders,
        batch_sizes: Tensor,
        reset: Tensor | None,
        *tensors: Any,
    ) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        count, (kept, _, reset_dim, *dims) = info.batch_size, in_dims[2:]
        if all(dim is None for dim in kept):  # only gradients come in samples
            grads, inputs = tensors[:4], tensors[4:]
            return _mapped_gradients(run, need, batch_sizes, reset, grads, dims[:4], inputs)
        walk = run.chosen.layer_walk if run.chosen is not None else None
        graph = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
        weighs = any(need[3:])  # each sample has gradients of weights
        directly = walk is not None and not graph and not modes.is_transformed()
        if any(dim is not None for dim in dims[7:]) or (weighs and not directly):
            args = (run, need, reserve, batch_sizes, reset, *tensors)
            return samples.one_by_one(TransformedBackward.apply, count, in_dims, args)
        # The gates are (N, D, 4H).
        axes = (-2, -2) if run.checkpoint else (-2, -2, 0, -2)
        saved = type(reserve)(
            *(samples.folded(t, d, count, a) for t, d, a in zip(reserve, kept, axes, strict=True))
        )
        args = (
            saved,
            batch_sizes * count,
            samples.folded(reset, reset_dim, count, axis=0),
            *(samples.folded(t, d, count) for t, d in zip(tensors[:7], dims, strict=False)),
            *tensors[7:],
        )
        if weighs:
            got = _sample_gradients(need, walk, count, *args)
        else:
            got = TransformedBackward.apply(run, need, *args)
        states = [samples.unfolded(t, count) for t in got[:3]]
        found = [*states, *((t, None if t is None else 0) for t in got[3:])]
        return tuple(t for t, _ in found), tuple(dim for _, dim in found)

    @staticmethod
    @modes.uncompiled
    def backward(ctx: Any, *grads_of_grads: Tensor | None) -> tuple[Any, ...]:
        return _pulled_back_twice(ctx, grads_of_grads)


def _pulled_back_twice(ctx: Any, grads_of_grads: Sequence[Tensor | None]) -> tuple[Any, ...]:
    """Second order whatever transforms are under way, or have been: they let no tensor be made a
    leaf, and what they had wrapped may outlive them, so here they differentiate themselves."""
    batch_sizes, reset, *saved = modes.unwrapped(ctx.saved_tensors)
    results = _differentiable(ctx.run, batch_sizes, reset, saved[4:], transformed=True)
    wanted = [g is not None for g in grads_of_grads]

    def first(tensors: list[Any]) -> list[Tensor | None]:
        return _pulled_back(results, tensors[4:], wanted, tensors[:4])

    with modes.without_autocast(saved[4].device):
        asked = ctx.needs_input_grad[5:]
        return (None,) * 5 + tuple(_pulled_back(first, saved, asked, grads_of_grads))


def _mapped_gradients(
    run: Run,
    need: Requested,
    batch_sizes: Tensor,
    reset: Tensor | None,
    grads: Sequence[Any],
    dims: Sequence[samples.Dim],
    inputs: Sequence[Any],
) -> tuple[tuple[Any, ...], tuple[samples.Dim, ...]]:
    """Gradients from several of the same results, through the reference, and their dimensions."""
    results = partial(_results, run, batch_sizes, reset, reference.layer_forward)
    x, h0, c0, w_ih, w_hh, bias, w_hr = need
    kinds = (x, h0, c0, *(w_ih, w_hh, bias, w_hr, bias) * (len(inputs) // len(Weights._fields)))
    asked = [ask and t is not None for ask, t in zip(kinds, inputs, strict=True)]

    def pull(*grads: Any) -> tuple[Any, ...]:
        return tuple(g for g in _pulled_back(results, inputs, asked, grads) if g is not None)

    found = iter(torch.func.vmap(pull, tuple(dims))(*grads))
    return tuple(next(found) if a else None for a in asked), tuple(0 if a else None for a in asked)


def _sample_gradients(
    need: Requested,
    walk: Any,
    count: int,
    reserve: Reserve,
    batch_sizes: Tensor,
    reset: Tensor | None,
    *tensors: Any,
) -> tuple[Tensor | None, ...]:
    """As ``_first_order``, of samples in one batch: gradients of weights for each of them."""
    grads, (x, h0, c0, *flat) = OutputGradients(*tensors[:4]), tensors[4:]
    weights = unflatten(flat)
    walked = walk(grads, batch_sizes, c0, weights, reset, reserve, need)
    rows, saved = packed_rows(x), reserve._replace(y=packed_rows(reserve.y))
    inputs = (rows, batch_sizes, h0, weights, reset, saved, need)
    got = products.sample_gradients(count, walked, *inputs)
    return _flat(got._replace(x=None if got.x is None else shaped(got.x, x)), weights)


def keep(ctx: Any, run: Run, *tensors: Tensor | None) -> None:
    """What a backward pass needs: saved this way, a tensor that is changed in place before it is
    noticed."""
    ctx.set_materialize_grads(False)
    ctx.run = run
    ctx.save_for_backward(*tensors)


def _differentiable(
    run: Run,
    batch_sizes: Tensor,
    reset: Tensor | None,
    inputs: Sequence[Any],
    transformed: bool = False,
) -> Function:
    """``_results`` by what is best differentiated more than once."""
    x, h0, _, *flat = inputs
    rows = packed_rows(x)
    forward = reference.layer_forward
    # Of torch's own LSTM transforms know no vmap, no tracing and no packed sequences.
    full = len(rows) == batch_sizes.numel() * h0.size(1)
    if not transformed or (full and modes.is_differentiated() and not modes.is_traced(x)):
        weights = unflatten(flat)[0]
        call = backends.Call(rows, batch_sizes, h0, weights, reset, run.need_cells, False)
        forward = backends.differentiable(call).layer_forward
    return partial(_results, run, batch_sizes, reset, forward)


def _results(
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


def _pulled_back(
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


def _composite_gradients(
    results: Function, grads: Sequence[Tensor | None], inputs: list[Any], create_graph: bool
) -> list[Tensor | None]:
    """Gradients of those ``inputs`` that require them, from those of their ``results``."""
    leaves = [t for t in inputs if t is not None and t.requires_grad]
    found = iter(differentiate(results(inputs), leaves, grads, create_graph))
    return [next(found) if t is not None and t.requires_grad else None for t in inputs]


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


def packed_rows(values: Tensor) -> Tensor:
    """(T, B, size) as packed rows."""
    return values.flatten(0, 1) if values.dim() == 3 else values


def shaped(rows: Tensor, like: Tensor) -> Tensor:
    """The inverse of ``packed_rows``: packed rows in the form of ``like``."""
    return rows.unflatten(0, like.shape[:2]) if like.dim() == 3 else rows

"""What torch.func.vmap runs a layer for: its samples as one batch, or one after the other.

Samples that share their weights make one batch: sequence b of sample s is its sequence
``b * samples + s``, so the sizes of steps never increase there either.  Samples with weights of
their own are run one by one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from . import modes
from .contract import Borders, Reserve

Dim = int | None  # along which a tensor has its samples; None where they share it

# The axes of sequences, of what is kept: rows and states have them before the last one, but the
# gates are (N, D, 4H).
AXES: dict[type, tuple[int, ...]] = {Reserve: (-2, -2, 0, -2), Borders: (-2, -2)}


def folded(tensor: Tensor | None, dim: Dim, samples: int, axis: int = -2) -> Any:
    """A tensor of all samples, whose ``axis``, that of sequences, is as many times longer."""
    if tensor is None:
        return None
    axis %= tensor.dim() - (dim is not None)
    if dim is None:
        shape = tensor.shape
        tensor = tensor.unsqueeze(axis + 1).expand(*shape[: axis + 1], samples, *shape[axis + 1 :])
    else:
        tensor = tensor.movedim(dim, axis + 1)
    return tensor.flatten(axis, axis + 1).contiguous()


def unfolded(tensor: Tensor | None, samples: int, axis: int = -2) -> tuple[Any, Dim]:
    """The inverse of ``folded``: a tensor, and along which dimension it has the samples."""
    if tensor is None:
        return None, None
    axis %= tensor.dim()
    sequences = tensor.size(axis) // samples
    return tensor.unflatten(axis, (sequences, samples)), axis + 1


def have_own_weights(dims: Sequence[Dim]) -> bool:
    """By the dimensions of gradients of y, c_all, h_n and c_n, x, h0, c0 and the weights."""
    return any(dim is not None for dim in dims[7:])


def share_all_but_gradients(dims: Sequence[Any]) -> bool:
    """The same question of all else, by the dimensions of reserve, batch_sizes, reset and those."""
    kept, sizes, reset, *rest = dims
    return all(dim is None for dim in (*kept, sizes, reset, *rest[4:]))


def samples_first(args: Any, dims: Any) -> tuple[Any, Any]:
    """Tensors with their samples along the first dimension, and these dimensions."""

    def first(tensor: Any, dim: Dim) -> Any:
        return tensor if dim is None else tensor.movedim(dim, 0)

    leaves, spec = pytree.tree_flatten(args)
    along = pytree.tree_leaves(dims)
    moved = [first(t, d) for t, d in zip(leaves, along, strict=True)]
    zeros = [None if d is None else 0 for d in along]
    return pytree.tree_unflatten(moved, spec), pytree.tree_unflatten(zeros, spec)


def merged(tensor: Any, outer: int, along: Dim, inner: int, within: Dim) -> Any:
    """A tensor of samples of samples as one of ``outer * inner`` samples, along dimension 0.

    It has the outer ones ``along`` one of its dimensions, and each of those has the inner ones
    along its dimension ``within``, which is 0 if there is one.
    """
    if tensor is None:
        return None
    tensor = tensor.unsqueeze(0) if along is None else tensor.movedim(along, 0)
    tensor = tensor.unsqueeze(1) if within is None else tensor.movedim(within + 1, 1)
    return tensor.expand(outer, inner, *tensor.shape[2:]).flatten(0, 1)


def folded_backward(
    samples: int,
    dims: Sequence[Any],
    reserve: Reserve | Borders,
    batch_sizes: Tensor,
    reset: Tensor | None,
    *tensors: Any,
) -> tuple[Any, ...]:
    """What a backward pass of samples that share their weights is given, as of one batch."""
    kept, _, reset_dim, *rest = dims
    axes = AXES[type(reserve)]
    saved = (folded(t, d, samples, axis) for t, d, axis in zip(reserve, kept, axes, strict=True))
    return (
        type(reserve)(*saved),
        batch_sizes * samples,
        folded(reset, reset_dim, samples, axis=0),
        *(folded(t, d, samples) for t, d in zip(tensors[:7], rest, strict=False)),
        *tensors[7:],
    )


def unfolded_gradients(
    samples: int, gradients: Sequence[Tensor | None], shape: tuple[int, ...] = ()
) -> tuple[tuple[Any, ...], tuple[Dim, ...]]:
    """Its gradients of x, h0, c0 and the weights, and along which dimension they have the samples.

    Those of weights come with the samples first, or with samples of samples, of this ``shape``.
    """
    found = [unfolded(t, samples) for t in gradients[:3]]
    for t in gradients[3:]:
        if t is None:
            found.append((None, None))
        else:
            found.append((t.unflatten(0, shape), 1) if shape else (t, 0))
    return tuple(t for t, _ in found), tuple(dim for _, dim in found)


def mapped(
    function: Callable[..., Sequence[Tensor | None]], tensors: Sequence[Any], dims: Sequence[Dim]
) -> list[Tensor | None]:
    """The function by vmap: its results with the samples first, None where it returns None."""
    there: list[bool] = []

    def alone(*tensors: Any) -> tuple[Tensor, ...]:
        results = function(*tensors)
        there[:] = [t is not None for t in results]
        return tuple(t for t in results if t is not None)

    found = iter(torch.func.vmap(alone, tuple(dims))(*tensors))
    return [next(found) if t else None for t in there]


def of_each(jvp: Callable[..., Sequence[Tensor | None]]) -> Callable[..., Any]:
    """A Function's ``jvp`` that is given several tangents at once, as torch.autograd.functional
    makes them in forward mode with ``vectorize=True``."""

    def each(ctx: Any, *tangents: Any) -> tuple[Tensor | None, ...]:
        if any(map(modes.is_batched, tangents)):
            return tuple(for_each(partial(jvp, ctx), tangents))
        return tuple(jvp(ctx, *tangents))

    return each


def for_each(
    function: Callable[..., Sequence[Tensor | None]], tensors: Sequence[Tensor | None]
) -> list[Tensor | None]:
    """A function of tensors of which ``is_grads_batched=True`` has made several."""
    level = modes.batching_level(tensors)
    several = [modes.unbatched(t, level) for t in tensors]
    given = [t if s is None else s for t, s in zip(tensors, several, strict=True)]
    found = mapped(function, given, [None if s is None else 0 for s in several])
    # (As tangents they are to lie in memory as what they are tangents of.)
    return [t if t is None else modes.batched(t.contiguous(), level) for t in found]


def joined(parts: Sequence[Tensor | None]) -> Tensor | None:
    """The samples of several batches, along dimension 0."""
    present = [t for t in parts if t is not None]
    if not present:
        return None
    return present[0] if len(parts) == 1 else torch.cat(present)


def none_of(
    tensors: Sequence[Any], dims: Sequence[Dim], each: Sequence[int | None] | None = None
) -> tuple[tuple[Any, ...], tuple[Dim, ...]]:
    """Results like these tensors, for no samples; of so many of ``each`` in every one."""
    results = []
    for k, (t, d) in enumerate(zip(tensors, dims, strict=True)):
        shape = [] if t is None else [n for axis, n in enumerate(t.shape) if axis != d]
        inner = [] if each is None or each[k] is None else [each[k]]
        results.append(None if t is None else t.new_zeros(0, *inner, *shape))
    return tuple(results), tuple(None if t is None else 0 for t in results)


def one_by_one(
    function: Callable[..., Sequence[Tensor | None]], samples: int, dims: Any, args: Any
) -> tuple[tuple[Any, ...], tuple[Dim, ...]]:
    """The function's results for each sample, stacked, and along which dimension they are."""
    leaves, spec = pytree.tree_flatten(args)
    along = pytree.tree_leaves(dims)

    def sample(k: int) -> Any:
        own = [t if d is None else t.select(d, k) for t, d in zip(leaves, along, strict=True)]
        return pytree.tree_unflatten(own, spec)

    several = zip(*(function(*sample(k)) for k in range(samples)), strict=True)
    results = tuple(None if each[0] is None else torch.stack(each) for each in several)
    return results, tuple(None if result is None else 0 for result in results)

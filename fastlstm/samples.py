"""What torch.func.vmap runs a layer for: its samples as one batch, or one after the other.

Samples that share their weights make one batch: sequence b of sample s is its sequence
``b * samples + s``, so the sizes of steps never increase there either.  Samples with weights of
their own are run one by one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

Dim = int | None  # along which a tensor has its samples; None where they share it


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

"""What kernels that walk on a GPU have in common: the rows of a walk, and what goes before it.

The input's share of the gates is a matrix product of torch's over all rows, or, where no reserve
is asked for, over as many steps at a time as there is room for.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .contract import Weights
from .steps import first_rows, on_device


class Walk(NamedTuple):
    """The rows of a walk. Steps without rows are left out."""

    steps: int
    rows_per_step: int  # of the longest step
    starts: list[int] | None  # (steps + 1) first row of each step; None where all are as long
    device_starts: Tensor | None  # the same

    def first_row(self, step: int) -> int:
        return step * self.rows_per_step if self.starts is None else self.starts[step]


def walk_of(batch_sizes: Tensor, device: torch.device) -> Walk:
    """``batch_sizes``, of which one at least is not 0; equal sizes need nothing on the device."""
    longest, shortest = int(batch_sizes[0]), int(batch_sizes[-1])
    steps = batch_sizes.numel() if shortest > 0 else int((batch_sizes > 0).sum())
    if longest in (shortest, int(batch_sizes[steps - 1])):
        return Walk(steps, longest, None, None)
    sizes = batch_sizes[:steps]
    starts = [0, *itertools.accumulate(sizes.tolist())]
    return Walk(steps, longest, starts, first_rows(on_device(sizes, device)))


def aligned(tensor: Tensor | None) -> Tensor | None:
    """Contiguous, and at a multiple of 16 bytes, which kernels may be compiled to rely on."""
    if tensor is None:
        return None
    tensor = tensor.contiguous()
    return tensor if tensor.data_ptr() % 16 == 0 else tensor.clone()


def stacked(tensors: Sequence[Tensor | None]) -> Tensor | None:
    """One tensor for all directions, or None; a copy only where there are two."""
    present = [t for t in tensors if t is not None]
    if not present:
        return None
    return torch.stack(present) if len(present) == 2 else aligned(present[0].unsqueeze(0))


def copied(gradient: Tensor | None, like: Tensor, dtype: torch.dtype) -> Tensor:
    """A copy that a walk may write to; zeros for an absent gradient."""
    if gradient is None:
        return torch.zeros(like.shape, dtype=dtype, device=like.device)
    return gradient.to(dtype, memory_format=torch.contiguous_format, copy=True)


class Range(NamedTuple):
    """Steps of a walk, counted in the order in which they are taken."""

    begin: int
    end: int
    origins: tuple[int, int]  # the row that comes first in the gates, by direction


def with_inputs(
    x: Tensor, walk: Walk, weights: Sequence[Weights], gates: Tensor, positions: int
) -> Iterator[Range]:
    """Fill ``gates`` with W_ih x + b of ``positions`` steps at a time; walk them in between.

    Args:
        gates: (rows, D, 4H), enough rows for so many of the longest steps.
    """
    for begin in range(0, walk.steps, positions):
        end = min(begin + positions, walk.steps)
        spans = [(begin, end), (walk.steps - end, walk.steps - begin)][: len(weights)]
        origins = [walk.first_row(first) for first, _ in spans]
        for d, (w, (first, last)) in enumerate(zip(weights, spans, strict=True)):
            part = x[walk.first_row(first) : walk.first_row(last)]
            if w.bias is None:
                torch.mm(part, w.w_ih.T, out=gates[: len(part), d])
            else:
                torch.addmm(w.bias, part, w.w_ih.T, out=gates[: len(part), d])
        yield Range(begin, end, (origins[0], origins[-1]))

"""Ragged sequences as packed rows: which row holds which step of which sequence.

What the answer looks like depends on the values of lengths, which torch.compile and torch.export
don't know.  So they see an operator, ``torch.ops.fastlstm.packing``, whose outputs have as many
rows as it turns out, and which looks at the values when the program runs.
"""

from __future__ import annotations

import reprlib
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from . import modes

_library = torch.library.Library("fastlstm", "FRAGMENT")
_library.define(
    "packing(Tensor lengths, SymInt steps)"
    " -> (Tensor batch_sizes, Tensor step, Tensor sequence, Tensor order, Tensor unsort)"
)


class Packing(NamedTuple):
    """Packed rows of B sequences in N steps in all; every tensor is int64 on the CPU."""

    batch_sizes: Tensor  # (T,)
    step: Tensor  # (N,) of each row, in its sequence
    sequence: Tensor  # (N,) of each row
    order: Tensor  # (B,): packed rows want the longest first
    unsort: Tensor  # (B,), the inverse of order


def pack(lengths: Tensor, steps: int) -> Packing:
    """Sequences of the given ``lengths (B,)``, int64 on the CPU, in up to ``steps`` steps.

    Raises:
        ValueError: a length is not between 0 and ``steps``.
    """
    run = torch.ops.fastlstm.packing if modes.is_traced(lengths) else _pack
    return Packing(*run(lengths, steps))


def _pack(lengths: Tensor, steps: int) -> tuple[Tensor, ...]:
    if len(lengths) and not 0 <= int(lengths.min()) <= int(lengths.max()) <= steps:
        wrong = int(((lengths < 0) | (lengths > steps)).nonzero()[0])
        raise ValueError(
            f"lengths: expected values from 0 to {steps}, the number of steps of input, "
            f"got {int(lengths[wrong])} for sequence {wrong}"
        )
    lengths, order = lengths.sort(descending=True, stable=True)
    running = lengths > torch.arange(steps, device="cpu").unsqueeze(1)  # (T, B)
    # nonzero() walks the steps in order and each step's sequences in order, as packed rows do.
    step, rank = running.nonzero().unbind(1)
    return running.sum(1), step.contiguous(), order[rank], order, order.argsort()


def _pack_fake(lengths: Tensor, steps: int) -> tuple[Tensor, ...]:
    rows = torch.library.get_ctx().new_dynamic_size()
    batch = lengths.size(0)
    return tuple(lengths.new_empty(size) for size in (steps, rows, rows, batch, batch))


_library.impl("packing", _pack, "CompositeExplicitAutograd")
torch.library.register_fake("fastlstm::packing", _pack_fake, lib=_library)


def checked_lengths(lengths: Tensor | Sequence[int], batch: int) -> Tensor:
    """``lengths`` as int64 on the CPU; the one place where they cross from a device.

    Their values are left to ``pack``.

    Raises:
        TypeError: they are no integers.
        ValueError: they are not one for each of ``batch`` sequences, or have no values.
    """
    if not isinstance(lengths, Tensor):
        given = lengths
        try:
            lengths = torch.as_tensor(given, device="cpu")
        except (TypeError, ValueError, RuntimeError) as error:
            raise TypeError(
                f"lengths: expected integers, got {reprlib.repr(given)}: {error}"
            ) from error
        if lengths.numel() == 0:  # an empty list makes a float tensor
            lengths = lengths.long()
    if lengths.layout != torch.strided:
        raise TypeError(f"lengths: expected a dense tensor, got layout {lengths.layout}")
    if not torch.compiler.is_compiling() and modes.samples_of(lengths):
        raise ValueError(
            "lengths: torch.func.vmap can't map them: expected the same for all samples"
        )
    if lengths.device.type == "meta":
        raise ValueError("lengths: expected values, got a tensor on meta, which has none")
    if lengths.is_floating_point() or lengths.is_complex() or lengths.dtype == torch.bool:
        raise TypeError(f"lengths: expected an integer dtype, got {lengths.dtype}")
    if lengths.shape != (batch,):
        raise ValueError(
            f"lengths: expected shape ({batch},), one length per sequence, "
            f"got {tuple(lengths.shape)}"
        )
    return lengths.to("cpu", torch.int64)

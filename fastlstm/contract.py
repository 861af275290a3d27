"""The layer contract's vocabulary: what every backend is given and what it gives back.

One *layer* is all its directions, run together over **packed rows**: row
``offset[t] + b`` holds step ``t`` of sequence ``b``, for ``b < batch_sizes[t]``.
``batch_sizes`` is a CPU int64 vector of length T that never increases, exactly
``PackedSequence.batch_sizes``, except that it may end in zeros; a padded batch is
the special case of equal sizes.  Sequences ``b >= batch_sizes[0]`` have no steps:
their final state is their initial state.  The reverse direction starts each
sequence at that sequence's own last step.

Letters used for shapes everywhere: N rows in all, T steps, B sequences, D
directions, I input features, H hidden (cell) size, P output size (``proj_size``,
or H without a projection).  Gate order is torch's: i, f, g, o.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Weights(NamedTuple):
    """The weights of one direction of one layer."""

    w_ih: Tensor  # (4H, I)
    w_hh: Tensor  # (4H, P)
    bias: Tensor | None  # (4H), the sum b_ih + b_hh
    w_hr: Tensor | None  # (P, H)


def state_dtype(dtype: torch.dtype) -> torch.dtype:
    """Dtype of cell states and of every accumulation when storage is ``dtype``."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


class Outputs(NamedTuple):
    """What a forward pass returns; also the shape of the gradients it is given back."""

    y: Tensor | None  # (N, D*P)
    c_all: Tensor | None  # (N, D*H), state dtype
    h_n: Tensor | None  # (D, B, P)
    c_n: Tensor | None  # (D, B, H)
    # The reserve, kept for the backward pass; absent from gradients.
    gates: Tensor | None = None  # (N, D, 4H), after activation
    m: Tensor | None = None  # (N, D*H), the unprojected h, with a projection only


class Requested(NamedTuple):
    """Which gradients a backward pass is asked for."""

    x: bool
    h0: bool
    c0: bool
    w_ih: bool
    w_hh: bool
    bias: bool
    w_hr: bool


class Gradients(NamedTuple):
    """Gradients in storage dtype, None where not asked for; weights' one per direction."""

    x: Tensor | None
    h0: Tensor | None
    c0: Tensor | None
    w_ih: list[Tensor] | None
    w_hh: list[Tensor] | None
    bias: list[Tensor] | None
    w_hr: list[Tensor] | None

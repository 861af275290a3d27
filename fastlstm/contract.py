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

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Weights(NamedTuple):
    """The weights of one direction of one layer."""

    w_ih: Tensor  # (4H, I)
    w_hh: Tensor  # (4H, P)
    bias: Tensor | None  # (4H), the sum b_ih + b_hh; b_ih where b_hh stands beside it
    w_hr: Tensor | None  # (P, H)
    b_hh: Tensor | None = None  # (4H); a backend gets None here

    @classmethod
    def of_module(cls, held: Sequence[Tensor], biased: bool) -> Weights:
        """From one direction's weights in nn.LSTM's order: w_ih, w_hh, then b_ih and b_hh if
        ``biased``, then w_hr if there is one."""
        w_ih, w_hh, *rest = held
        b_ih, b_hh, *w_hr = rest if biased else (None, None, *rest)
        return cls(w_ih, w_hh, b_ih, w_hr[0] if w_hr else None, b_hh)

    def summed(self) -> Weights:
        """As backends take them, with one bias."""
        if self.b_hh is None:
            return self
        assert self.bias is not None
        return Weights(self.w_ih, self.w_hh, self.bias + self.b_hh, self.w_hr)


def by_kind(weights: Sequence[Weights]) -> list[list[Tensor]]:
    """w_ih, w_hh, bias and w_hr, each of all directions, or of none where the layer has none."""
    kinds: list[list[Tensor]] = [[], [], [], []]
    for w in weights:
        for kind, tensor in zip(kinds, w, strict=False):
            if tensor is not None:
                kind.append(tensor)
    return kinds


def state_dtype(dtype: torch.dtype) -> torch.dtype:
    """Dtype of cell states and of every accumulation when storage is ``dtype``."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


class Reserve(NamedTuple):
    """What a backward pass needs of the forward pass, besides its inputs."""

    y: Tensor  # (N, D*P)
    c_all: Tensor  # (N, D*H), state dtype
    gates: Tensor  # (N, D, 4H), after activation
    m: Tensor | None  # (N, D*H), the unprojected h, with a projection only


class Borders(NamedTuple):
    """What checkpoint.py keeps instead."""

    y: Tensor  # (N, D*P)
    c: Tensor  # (chunks + 1, D, B, H), as each chunk was entered


class Outputs(NamedTuple):
    """What a forward pass returns; c_all, gates and m only where they were asked for."""

    y: Tensor  # (N, D*P)
    c_all: Tensor | None  # (N, D*H), state dtype
    h_n: Tensor  # (D, B, P)
    c_n: Tensor  # (D, B, H)
    gates: Tensor | None = None  # as in Reserve
    m: Tensor | None = None

    def reserve(self) -> Reserve:
        """What to keep for the backward pass; it must have been asked for."""
        if self.c_all is None or self.gates is None:
            raise ValueError("the forward pass was not asked for its reserve")
        return Reserve(self.y, self.c_all, self.gates, self.m)


class Tangents(NamedTuple):
    """What a layer makes of tangents (eq. 10), in state dtype."""

    y: Tensor  # (N, D*P)
    c_all: Tensor  # (N, D*H)
    h_n: Tensor  # (D, B, P)
    c_n: Tensor  # (D, B, H)
    m: Tensor | None  # (N, D*H), with a projection only


class Curvature(NamedTuple):
    """What reaches a layer's values through its cells' second derivatives (eq. 11)."""

    a: Tensor  # (N, D, 4H), the pre-activations
    c_all: Tensor  # (N, D*H)
    c0: Tensor  # (D, B, H)


class OutputGradients(NamedTuple):
    """What a backward pass is given; None where nothing came back for an output."""

    y: Tensor | None
    c_all: Tensor | None
    h_n: Tensor | None
    c_n: Tensor | None


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

"""The ``aten`` backend: torch's own fused LSTM (cuDNN, oneDNN, MPS), one layer at a time.

torch differentiates it by itself, so there is no backward function here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .contract import Outputs, Weights

if TYPE_CHECKING:
    from .backends import Call


def unsupported(call: Call) -> str | None:
    """What torch's own LSTM cannot do."""
    if call.reset is not None:
        return "torch's own LSTM has no resets"
    if call.need_cells:
        return "torch's own LSTM does not return its cell states"
    if call.x.size(0) == 0 and call.h0.size(1) > 0:
        return "torch's own LSTM needs at least one step"
    sizes = call.batch_sizes
    batch = call.h0.size(1)
    if batch > 0 and sizes.numel() > 0 and (int(sizes[0]) != batch or int(sizes[-1]) == 0):
        return "torch's own LSTM does not take sequences without steps"
    return None


def layer_forward(
    x: Tensor,
    batch_sizes: Tensor,
    h0: Tensor,
    c0: Tensor,
    weights: Sequence[Weights],
    reset: Tensor | None,
    need_reserve: bool,
    need_cells: bool,
) -> Outputs:
    """One layer through ``torch.lstm``; shapes as in ``contract.Outputs``."""
    steps, batch = batch_sizes.numel(), h0.size(1)
    flat: list[Tensor] = []
    for w in weights:
        # The bias comes summed; torch wants two of them, or none for any direction.
        biases = [] if w.bias is None else [w.bias, torch.zeros_like(w.bias)]
        flat += [w.w_ih, w.w_hh, *biases, *([] if w.w_hr is None else [w.w_hr])]
    has_biases, bidirectional = weights[0].bias is not None, len(weights) == 2
    # num_layers, dropout; cuDNN keeps its reserve only in training
    common = (flat, has_biases, 1, 0.0, need_reserve, bidirectional)
    if steps * batch == x.size(0):  # all sequences have all steps: no packing
        y, h_n, c_n = torch._VF.lstm(x.view(steps, batch, x.size(1)), (h0, c0), *common, False)
        y = y.reshape(steps * batch, y.size(2))
    else:
        y, h_n, c_n = torch._VF.lstm(x, batch_sizes, (h0, c0), *common)
    return Outputs(y=y, c_all=None, h_n=h_n, c_n=c_n)

"""What goes on inside a layer: the gates of every step."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from .module import LSTM, State


class Gates(NamedTuple):
    """The gates of every step, after activation (eq. 2); each like output with D*H features."""

    i: Tensor | PackedSequence  # input gate, 0 to 1: how much of g is added to the cell state
    f: Tensor | PackedSequence  # forget gate, 0 to 1: how much of the cell state is kept
    g: Tensor | PackedSequence  # candidate, -1 to 1: what may be added
    o: Tensor | PackedSequence  # output gate, 0 to 1: how much of tanh(cell state) is shown


def gates(
    module: LSTM,
    input: Tensor | PackedSequence,
    hx: State | None = None,
    *,
    lengths: Tensor | Sequence[int] | None = None,
    reset: Tensor | PackedSequence | None = None,
    layer: int = -1,
) -> Gates:
    """The gates of one layer at every step, as they are when ``module`` runs on ``input``.

    They are what the forward pass keeps for training, on any device and in any dtype, rounded to
    that dtype and without gradients.  Where the module's backend keeps none, as "aten" does, this
    layer's are computed by the first that does.  Later layers don't run.

    Together with ``return_cells`` they show all of (eq. 3, 4) of docs/design.md:
    ``c[t] == f[t] * c[t-1] + i[t] * g[t]`` and ``h[t] == o[t] * tanh(c[t])``.

    Args:
        module: a ``fastlstm.LSTM``; in training mode its dropout between layers is at work.
            Hooks on it are not called.
        input, hx, lengths, reset: as for ``module`` itself.
        layer: which layer, from 0; negative numbers count from the last.

    Returns:
        i, f, g and o, each (T, B, D*H), or (B, T, D*H) with ``batch_first``, (T, D*H) for one
        sequence, a PackedSequence for packed input; zero where ``lengths`` says padding.  With
        two directions, the forward one's H features come first.

    Raises:
        TypeError: ``module`` is not a ``fastlstm.LSTM``, or ``layer`` no integer.
        IndexError: it has no such layer.
        As ``module`` does, where another argument does not fit or the backend can't run a layer
        before.
    """
    if not isinstance(module, LSTM):
        raise TypeError(
            f"module: expected a fastlstm.LSTM, got {type(module).__name__} "
            "(fastlstm.replace_lstm_ makes one of an nn.LSTM)"
        )
    try:
        layer = operator.index(layer)
    except TypeError:
        raise TypeError(f"layer: expected an integer, got {type(layer).__name__}") from None
    if not -module.num_layers <= layer < module.num_layers:
        raise IndexError(f"layer: expected one of {module.num_layers} layers, got {layer}")
    stack = module._stack(need_cells=False)._replace(gates_of=layer % module.num_layers)
    with torch.no_grad():
        found = module._run(input, hx, lengths, reset, stack).output
    if isinstance(found, PackedSequence):
        return Gates(*(found._replace(data=part) for part in found.data.chunk(4, -1)))
    return Gates(*found.chunk(4, -1))

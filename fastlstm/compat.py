"""The leaf that is also an ``isinstance`` of nn.LSTM."""

from __future__ import annotations

from torch import nn

from . import module

# fastlstm itself imports this file, so this is torch's own class and never patch()'s.
Stock = nn.LSTM


class LSTM(module.LSTM, Stock):
    """``fastlstm.LSTM`` for programs that ask ``isinstance(m, torch.nn.LSTM)``.

    torch.compile refuses it as it refuses every ``nn.LSTM``; use ``fastlstm.LSTM``
    where that matters.
    """

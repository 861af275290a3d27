"""fastlstm: torch.nn.LSTM, faster on the CPU, in every way PyTorch lets a module be used."""

from .backends import available_backends
from .cell import LSTMCell
from .inspect import gates
from .module import LSTM
from .surgery import patch, replace_lstm_, restore_lstm_

__version__ = "0.1.0"

__all__ = [
    "LSTM",
    "LSTMCell",
    "available_backends",
    "gates",
    "patch",
    "replace_lstm_",
    "restore_lstm_",
]

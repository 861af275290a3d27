"""What tune.py tunes: the character model on a text, and the forecaster on the sunspots."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

import char_rnn
import texts
import time_series
import torch
from torch import Tensor, nn
from torch.nn import functional as F

Choice = dict[str, Any]  # a value for each hyperparameter; tune.py's UNTUNED has all of them


class Task(Protocol):
    """Something to learn, and the budget that every trial has for it."""

    name: str
    unit: str  # of the validation loss
    size: int  # how much there is to learn from; losses compare only where it is the same
    epochs: int  # the most
    patience: int  # epochs without a better validation loss before a trial stops

    def model(self, choice: Choice) -> nn.Module:
        """A new model around nn.LSTM."""

    def losses(self, model: nn.Module, choice: Choice) -> Iterator[Tensor]:
        """One epoch: the loss of each minibatch in turn."""

    def judge(self, model: nn.Module, held_out: bool = False) -> float:
        """The loss on the part that choices are made on, or on the one that none is made on."""


class CharTask:
    """The character model on a part of CPython's help topics; loss in bits per character."""

    name, unit, epochs, patience, steps = "char", "bits per character", 6, 2, 64

    def __init__(self, size: int) -> None:
        self.size = size
        text = texts.python_topics()[:size]
        self.vocabulary = "".join(sorted(set(text)))
        ids = char_rnn.encode(text, self.vocabulary, "the text")
        self.training = ids[: size * 8 // 10]
        parts = (ids[size * 8 // 10 : size * 9 // 10], ids[size * 9 // 10 :])
        self.judged = [char_rnn.cut_into_streams(part, 16) for part in parts]

    def model(self, choice: Choice) -> nn.Module:
        shape = {"embedding": 32, "hidden": choice["hidden"], "layers": choice["layers"]}
        return char_rnn.CharModel(len(self.vocabulary), shape, choice["dropout"])

    def losses(self, model: nn.Module, choice: Choice) -> Iterator[Tensor]:
        streams, state = char_rnn.cut_into_streams(self.training, choice["batch"]), None
        batches = char_rnn.windows(*streams, self.steps)
        for _, (x, y, _) in zip(range(len(streams[0]) // self.steps), batches, strict=False):
            logits, state = model(x, state)
            state = (state[0].detach(), state[1].detach())
            yield F.cross_entropy(logits.flatten(0, 1), y.flatten())

    def judge(self, model: nn.Module, held_out: bool = False) -> float:
        return char_rnn.bits_per_character(model, self.judged[held_out], 128)


class SeriesTask:
    """The forecaster on the yearly sunspots; loss in squared deviations of the series."""

    name, unit, epochs, patience = "series", "mean squared error, scaled", 80, 15

    def __init__(self, _: int) -> None:
        series = time_series.read_column(time_series.sunspots(), "SUNACTIVITY")
        self.size = len(series)
        self.horizon, cut = 11, (33, 11)
        parts = time_series.split(series, *cut)
        self.training = time_series.cut_windows(parts.scaled, 0, parts.validation, *cut)
        self.judged = [
            time_series.cut_windows(parts.scaled, first, end, *cut)
            for first, end in ((parts.validation, parts.tail), (parts.tail, len(series)))
        ]

    def model(self, choice: Choice) -> nn.Module:
        between_layers = choice["dropout"] if choice["layers"] > 1 else 0.0
        lstm = nn.LSTM(1, choice["hidden"], choice["layers"], dropout=between_layers)
        return time_series.Forecaster(lstm, self.horizon, choice["dropout"])

    def losses(self, model: nn.Module, choice: Choice) -> Iterator[Tensor]:
        past, future = self.training
        for places in torch.randperm(len(future)).split(choice["batch"]):
            yield F.mse_loss(model(past[:, places]), future[places])

    @torch.no_grad()
    def judge(self, model: nn.Module, held_out: bool = False) -> float:
        past, future = self.judged[held_out]
        model.eval()
        loss = F.mse_loss(model(past), future).item()
        model.train()
        return loss


TASKS = {"char": CharTask, "series": SeriesTask}

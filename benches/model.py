"""The character model of examples/char_rnn.py, end to end: a whole step of its training."""

from __future__ import annotations

import copy
import sys
from functools import partial
from typing import Any

import torch
from recording import ROOT
from torch import Tensor

import fastlstm
from fastlstm.cli.arguments import Shape
from fastlstm.cli.compare import difference
from fastlstm.cli.timing import paired

sys.path.append(str(ROOT / "examples"))

from char_rnn import CharModel, Learner

VOCABULARY = 96
CLIP = 1.0


class ModelContest:
    """Two models with the same weights, of which one has its LSTM replaced."""

    def __init__(self, shape: Shape) -> None:
        steps, batch, embedding, hidden = shape
        torch.manual_seed(0)
        sizes = dict(embedding=embedding, hidden=hidden, layers=1)
        stock = CharModel(VOCABULARY, sizes)
        replaced = copy.deepcopy(stock)
        fastlstm.replace_lstm_(replaced)
        self.x, self.y = torch.randint(VOCABULARY, (2, steps, batch)).unbind()
        self.theirs, self.ours = (
            Learner(name, model, torch.optim.Adam(model.parameters()))
            for name, model in (("nn.LSTM", stock), ("fastlstm", replaced))
        )

    def results(self, learner: Learner) -> dict[str, Tensor | None]:
        """The loss, and the gradient of every parameter."""
        learner.optimizer.zero_grad()
        learner.state = None
        loss = learner.loss(self.x, self.y)
        loss.backward()
        named = learner.model.named_parameters()
        return {"loss": loss} | {f"gradient of {name}": p.grad for name, p in named}

    def problem(self) -> str | None:
        """How the models differ, or None."""
        ours, theirs = self.results(self.ours), self.results(self.theirs)
        found = ((name, difference(ours[name], theirs[name])) for name in theirs)
        return next((f"{name} {text}" for name, text in found if text), None)

    def step(self, learner: Learner) -> None:
        """Forward, backward, clipping and Adam's step; each starts from a zero state."""
        learner.step(self.x, self.y, True, CLIP)

    def time(self, seconds: float) -> dict[str, Any]:
        """The measured part of a row."""
        calls = partial(self.step, self.ours), partial(self.step, self.theirs)
        return paired(*calls, lambda: None, seconds).row()

"""One shape, two modules with the same weights: results compared, then times taken in turn."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..compat import Stock
from ..module import LSTM
from .arguments import Shape
from .compare import difference
from .timing import Clock, cuda_seconds_per_call, paired, seconds_per_call

Row = dict[str, Any]

MODES = {"train": "training", "infer": "inference"}


class Contest:
    """One shape: two modules with the same weights, and what both are fed."""

    clock: Clock = staticmethod(seconds_per_call)

    def __init__(
        self,
        shape: Shape,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
        backend: str = "auto",
    ) -> None:
        steps, batch, inputs, hidden = shape
        made: dict[str, Any] = {"dtype": dtype, "device": torch.device(device)}
        torch.manual_seed(0)
        self.theirs: nn.Module = Stock(inputs, hidden, **made)
        self.ours: nn.Module = LSTM(inputs, hidden, backend=backend, **made)
        self.ours.load_state_dict(self.theirs.state_dict())
        self.x = torch.randn(steps, batch, inputs, requires_grad=True, **made)
        self.hx = torch.randn(2, 1, batch, hidden, **made).unbind()
        self.dy = torch.randn(steps, batch, hidden, **made)
        if made["device"].type == "cuda":
            self.clock = cuda_seconds_per_call

    def clear(self) -> None:
        """No gradients, so that the next backward need not add to them."""
        for leaf in (self.x, *self.ours.parameters(), *self.theirs.parameters()):
            leaf.grad = None

    def run(self, module: nn.Module) -> tuple[Tensor, Tensor, Tensor]:
        """Forward: the output and the final states."""
        output, (h_n, c_n) = module(self.x, self.hx)
        return output, h_n, c_n

    def train(self, module: nn.Module) -> tuple[Tensor, Tensor, Tensor]:
        """Forward and backward: gradients of the input and of every parameter."""
        found = self.run(module)
        found[0].backward(self.dy)
        return found

    @torch.no_grad()
    def infer(self, module: nn.Module) -> tuple[Tensor, Tensor, Tensor]:
        """Forward without what a backward would need."""
        return self.run(module)

    def results(self, module: nn.Module) -> dict[str, Tensor | None]:
        """Everything ``train`` and ``infer`` compute."""
        names = ("output", "h_n", "c_n")
        self.clear()
        found: dict[str, Tensor | None] = dict(zip(names, self.train(module.train()), strict=True))
        leaves = (("input", self.x), *module.named_parameters())
        found |= {f"gradient of {name}": leaf.grad for name, leaf in leaves}
        inferred = self.infer(module.eval())
        return found | {f"{k} of inference": v for k, v in zip(names, inferred, strict=True)}

    def problem(self) -> str | None:
        """How our results differ from nn.LSTM's, or None."""
        ours, theirs = self.results(self.ours), self.results(self.theirs)
        differences = (difference(ours[name], theirs[name]) for name in theirs)
        found = zip(theirs, differences, strict=True)
        return next((f"{name} {text}" for name, text in found if text), None)

    def time(self, mode: str, seconds: float) -> Row:
        """The measured part of a row."""
        for module in (self.ours, self.theirs):
            module.train(mode == "train")  # nn.LSTM keeps what a backward needs when training
        step = self.train if mode == "train" else self.infer
        calls = partial(step, self.ours), partial(step, self.theirs)
        return paired(*calls, self.clear, seconds, self.clock).row()

    def row(self, shape: Shape, mode: str, seconds: float) -> Row:
        """As ``time``, with the rate of both."""
        row = self.time(mode, seconds)
        work = flops(shape, mode) / 1e9
        return row | {"gflops": {who: work / row[who]["median"] for who in ("ours", "theirs")}}


def flops(shape: Shape, mode: str) -> int:
    """Of the matrix products: a backward has twice its forward's."""
    steps, batch, inputs, hidden = shape
    forward = 8 * hidden * (inputs + hidden) * steps * batch
    return forward * (3 if mode == "train" else 1)

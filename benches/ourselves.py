"""Contests of fastlstm against itself: half precision against float32, threads against one."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import fastlstm
from fastlstm.cli.arguments import Shape
from fastlstm.cli.contest import Contest


class HalfContest(Contest):
    """A module in half precision against fastlstm in float32."""

    def __init__(self, shape: Shape, dtype: torch.dtype) -> None:
        super().__init__(shape, dtype)
        self.stock, (_, _, inputs, hidden) = self.theirs, shape
        self.theirs = fastlstm.LSTM(inputs, hidden)
        self.wide = {name: getattr(self, name).float() for name in ("x", "dy")}
        self.wide["x"] = self.wide["x"].detach().requires_grad_()
        self.wide["hx"] = tuple(state.float() for state in self.hx)

    def run(self, module: nn.Module) -> tuple[Tensor, Tensor, Tensor]:
        wide = module is self.theirs
        output, (h_n, c_n) = module(*((self.wide if wide else vars(self))[n] for n in ("x", "hx")))
        return output, h_n, c_n

    def train(self, module: nn.Module) -> tuple[Tensor, Tensor, Tensor]:
        found = self.run(module)
        found[0].backward(self.wide["dy"] if module is self.theirs else self.dy)
        return found

    def clear(self) -> None:
        super().clear()
        self.wide["x"].grad = None

    def problem(self) -> str | None:
        """How ours differs from nn.LSTM in half precision; of the float32 rival others tell."""
        rival, self.theirs = self.theirs, self.stock
        try:
            return super().problem()
        finally:
            self.theirs = rival


class ThreadsContest(Contest):
    """fastlstm on several threads against fastlstm on one."""

    def __init__(self, shape: Shape, threads: int) -> None:
        super().__init__(shape, torch.float32)
        self.threads, self.stock = threads, self.theirs
        self.theirs = fastlstm.LSTM(*shape[2:])
        self.theirs.load_state_dict(self.stock.state_dict())

    def run(self, module: nn.Module) -> tuple[Tensor, Tensor, Tensor]:
        torch.set_num_threads(1 if module is self.theirs else self.threads)
        return super().run(module)

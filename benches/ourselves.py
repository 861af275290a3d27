"""Contests of fastlstm against itself: half precision against float32, threads against one."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import fastlstm
from fastlstm.cli.arguments import Shape
from fastlstm.cli.contest import Contest


class HalfContest(Contest):
    """A module in half precision against fastlstm in float32, which has weights of its own."""

    def __init__(self, shape: Shape, dtype: torch.dtype) -> None:
        super().__init__(shape, dtype)
        self.stock = self.theirs
        self.theirs = self.single = fastlstm.LSTM(*shape[2:])
        self.wide_x = self.x.detach().float().requires_grad_()
        self.wide_hx = tuple(state.float() for state in self.hx)
        self.wide_dy = self.dy.float()

    def run(self, module: nn.Module) -> tuple[Tensor, Tensor, Tensor]:
        wide = module is self.single
        given = (self.wide_x, self.wide_hx) if wide else (self.x, self.hx)
        output, (h_n, c_n) = module(*given)
        return output, h_n, c_n

    def train(self, module: nn.Module) -> tuple[Tensor, Tensor, Tensor]:
        found = self.run(module)
        found[0].backward(self.wide_dy if module is self.single else self.dy)
        return found

    def clear(self) -> None:
        super().clear()
        self.wide_x.grad = None

    def problem(self) -> str | None:
        """How ours differs from nn.LSTM in half precision; other rows tell of the float32 rival."""
        self.theirs = self.stock
        try:
            return super().problem()
        finally:
            self.clear()
            self.theirs = self.single


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

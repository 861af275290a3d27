"""What a call takes beyond its input, output and their gradients, measured.

    python tests/peak_memory.py CHECKPOINT STEPS BATCH SIZE

prints bytes and seconds of a training step.  A process of its own, so that nothing else has left
memory behind.
"""

from __future__ import annotations

import ctypes
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

import fastlstm


def status(key: str) -> int:
    """A line of /proc/self/status, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key):
            return int(line.split()[1]) * 1024
    raise KeyError(key)


def measure(
    module: nn.Module, steps: int, batch: int, mode: str = "train", warm: nn.Module | None = None
) -> tuple[int, float]:
    """Bytes and seconds of one training step, or of one call without gradients.

    The first step loads code and gives BLAS its buffers.  What a module keeps for its next call
    counts only where another one, ``warm``, has taken that step.
    """
    train = mode == "train"

    def prepared(module: nn.Module) -> tuple[Tensor, Callable[[], Tensor]]:
        x = torch.randn(steps, batch, module.input_size).requires_grad_(train)
        dy = torch.ones(steps, batch, module.hidden_size) if train else None
        x.grad = torch.zeros_like(x) if train else None

        def step() -> Tensor:
            with torch.set_grad_enabled(train):
                y = module(x)[0]
            if train:
                y.backward(dy)
            return y

        return x, step

    x, step = prepared(module)
    (step if warm is None else prepared(warm)[1])()
    ctypes.CDLL(None).malloc_trim(0)  # what it freed is given back
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    before, start = status("VmRSS"), time.perf_counter()
    y = step()
    seconds = time.perf_counter() - start
    # y, and what is added to the gradients of x and of the parameters.
    known = [y, x, *module.parameters()] if train else [y]
    return status("VmHWM") - before - sum(t.nbytes for t in known), seconds


if __name__ == "__main__":
    torch.set_num_threads(1)
    checkpoint, (steps, batch, size) = sys.argv[1] == "True", map(int, sys.argv[2:])
    module, warm = (
        fastlstm.LSTM(n, n, checkpoint=checkpoint, backend="cpu") for n in (size, min(size, 8))
    )
    print(*measure(module, steps, batch, warm=warm))

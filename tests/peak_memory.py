"""What a training step takes beyond its input, output and their gradients, measured.

    python tests/peak_memory.py CHECKPOINT STEPS BATCH SIZE

prints bytes and seconds.  A process of its own, so that nothing else has left memory behind.
"""

from __future__ import annotations

import ctypes
import sys
import time
from pathlib import Path

import torch

import fastlstm


def status(key: str) -> int:
    """A line of /proc/self/status, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key):
            return int(line.split()[1]) * 1024
    raise KeyError(key)


def measure(checkpoint: bool, steps: int, batch: int, size: int) -> tuple[int, float]:
    """Bytes and seconds of one training step of a layer of ``size`` inputs and units."""
    module = fastlstm.LSTM(size, size, checkpoint=checkpoint, backend="cpu")
    x = torch.randn(steps, batch, size).requires_grad_()
    dy = torch.ones(steps, batch, size)
    x.grad = torch.zeros_like(x)
    # The first step loads code and gives BLAS its buffers.  What it freed is given back.
    module(x)[0].backward(dy)
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    before, start = status("VmRSS"), time.perf_counter()
    y, _ = module(x)
    y.backward(dy)
    seconds = time.perf_counter() - start
    # y, and what is added to the gradients of x (as large as y) and of the parameters.
    known = 2 * x.nbytes + sum(p.nbytes for p in module.parameters())
    return status("VmHWM") - before - known, seconds


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(*measure(sys.argv[1] == "True", *map(int, sys.argv[2:])))

"""A program: an LSTM called by every thread of somebody else's OpenMP region.

    python parallel_region.py LIBRARY

LIBRARY is ``REGION`` compiled.  Prints how many threads called.  The exit status is not zero where
one got other values or gradients than a call outside of the region.
"""

from __future__ import annotations

import ctypes
import sys

import torch

import fastlstm
from cases import tolerance

REGION = """
extern "C" void region(int threads, void (*call)()) {
#pragma omp parallel num_threads(threads)
  call();
}
"""


def main(library: str) -> None:
    torch.set_num_threads(2)
    # Large enough for two threads, which walk alone (8 sequences) or meet at every step (3).
    jobs = []
    for batch in (8, 3):
        module = fastlstm.LSTM(40, 130, bidirectional=True)
        x = torch.randn(12, batch, 40, requires_grad=True)
        leaves = [x, *module.parameters()]
        jobs.append((module, x, leaves))

    def results() -> list[torch.Tensor]:
        found = []
        for module, x, leaves in jobs:
            y, (h_n, c_n) = module(x)
            found += [y, h_n, c_n, *torch.autograd.grad(y.square().sum(), leaves)]
        return found

    want, got = results(), []
    call = ctypes.CFUNCTYPE(None)(lambda: got.append(results()))
    for _ in range(5):
        ctypes.CDLL(library).region(2, call)
    for found in got:
        for a, b in zip(found, want, strict=True):
            torch.testing.assert_close(a, b, **tolerance(torch.float32))
    print(len(got))


if __name__ == "__main__":
    main(sys.argv[1])

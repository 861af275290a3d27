"""The limits of the machine that benches/run.py runs on: its best product and copy."""

from __future__ import annotations

import math
from functools import partial
from time import perf_counter

import torch

from fastlstm.cli.timing import Call, seconds_per_call

LIMIT_SECONDS = 0.4


def _best_seconds(run: Call) -> float:
    """The fastest call: for a limit, what a noisy machine managed once counts."""
    run()
    best, deadline = math.inf, perf_counter() + LIMIT_SECONDS
    while best == math.inf or perf_counter() < deadline:
        best = min(best, seconds_per_call(run, lambda: None, 1))
    return best


def best_matmul(dtype: torch.dtype) -> float:
    """GF/s of torch's best large square matmul: what a BLAS gets out of these threads."""
    rates = []
    for size in (512, 1024, 2048):
        a, b = torch.randn(2, size, size, dtype=dtype)
        out = torch.empty_like(a)
        rates.append(2 * size**3 / _best_seconds(partial(torch.mm, a, b, out=out)))
    return max(rates) / 1e9


def copy_bandwidth() -> float:
    """GB/s, read plus written, of copying 256 MiB."""
    source = torch.randn(2**26)
    target = torch.empty_like(source)
    return 2 * source.nbytes / _best_seconds(partial(target.copy_, source)) / 1e9

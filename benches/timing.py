"""Paired timing, and the limits of the machine it runs on."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from functools import partial
from time import perf_counter
from typing import NamedTuple

import torch

# A sample repeats a short call until it lasts this long: the clock, the scheduler and what
# the rival left in the caches then matter little.
SAMPLE_SECONDS = 0.005
MIN_PAIRS = 5  # fewer have no quartiles worth the name
LIMIT_SECONDS = 0.4

Call = Callable[[], object]
Clock = Callable[[Call, Call, int], float]  # run, before, calls: seconds per call


class Quartiles(NamedTuple):
    """The middle of a sample and how far it scatters."""

    q1: float
    median: float
    q3: float


class Paired(NamedTuple):
    """Two calls timed in turn."""

    pairs: int
    calls: int  # per sample
    ours: Quartiles  # seconds per call
    theirs: Quartiles
    ratio: Quartiles  # theirs / ours, pair by pair: above 1, ours is faster


def quartiles(values: Sequence[float]) -> Quartiles:
    """First quartile, median and third quartile of two values or more."""
    return Quartiles(*statistics.quantiles(values, n=4, method="inclusive"))


def seconds_per_call(run: Call, before: Call, calls: int) -> float:
    """Mean seconds of ``run()``; ``before()`` precedes every call, untimed."""
    total = 0.0
    for _ in range(calls):
        before()
        start = perf_counter()
        run()
        total += perf_counter() - start
    return total / calls


def cuda_seconds_per_call(run: Call, before: Call, calls: int) -> float:
    """The same on a GPU, between events; the host may run ahead, as it does in training."""
    events = []
    torch.cuda.synchronize()
    for _ in range(calls):
        before()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        events.append((start, end))
    torch.cuda.synchronize()
    return sum(start.elapsed_time(end) for start, end in events) / 1e3 / calls


def paired(
    ours: Call, theirs: Call, before: Call, seconds: float, clock: Clock = seconds_per_call
) -> Paired:
    """Time both in alternation, so that both meet the same machine, noise and all.

    The order is swapped in every other pair, because the second of a pair may profit or
    suffer from the first.
    """
    once = max(clock(run, before, 1) for run in (ours, theirs))
    calls = max(1, math.ceil(SAMPLE_SECONDS / once))
    samples: list[tuple[float, float]] = []
    deadline = perf_counter() + seconds
    while len(samples) < MIN_PAIRS or perf_counter() < deadline:
        if len(samples) % 2 == 0:
            mine = clock(ours, before, calls)
            other = clock(theirs, before, calls)
        else:
            other = clock(theirs, before, calls)
            mine = clock(ours, before, calls)
        samples.append((mine, other))
    return Paired(
        len(samples),
        calls,
        quartiles([mine for mine, _ in samples]),
        quartiles([other for _, other in samples]),
        quartiles([other / mine for mine, other in samples]),
    )


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

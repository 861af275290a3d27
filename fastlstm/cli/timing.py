"""Paired timing: two calls in turn, so that both meet the same machine."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from time import perf_counter
from typing import Any, NamedTuple

import torch

# A sample repeats a short call until it lasts this long: the clock, the scheduler and what
# the rival left in the caches then matter little.
SAMPLE_SECONDS = 0.005
MIN_PAIRS = 5  # fewer have no quartiles worth the name

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

    def row(self) -> dict[str, Any]:
        """For JSON."""
        quartiles = {name: getattr(self, name)._asdict() for name in ("ours", "theirs", "ratio")}
        return {"pairs": self.pairs, "calls": self.calls} | quartiles


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

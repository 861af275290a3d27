"""A GPU or, in a dry run, the CPU: what the steps of ``make gpu`` have in common."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import TypeVar

import torch

from fastlstm.kernels import launch

Result = TypeVar("Result")
KERNELS = ("cluster", "grid")  # the two kinds of the cuda backend


def device_of(name: str) -> torch.device:
    """With its index, as kernels' faults are kept by it."""
    return torch.device(name, 0) if name == "cuda" else torch.device(name)


def synchronize(device: torch.device) -> None:
    """Wait for a GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@contextlib.contextmanager
def setting(owner: object, name: str, value: object) -> Iterator[None]:
    """``owner.name`` for a while."""
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


@contextlib.contextmanager
def by_exchanges() -> Iterator[None]:
    """Each exchange is a launch of its own, as on a device that has no room for a team."""
    limits = launch.limits
    with (
        setting(launch, "limits", lambda device: limits(device)._replace(threads=0)),
        setting(launch, "_PREPARED", {}),
    ):
        yield


def captured(call: Callable[[], Result]) -> tuple[Callable[[], None], Result]:
    """``call``'s work in a CUDA graph: what replays it, and the results that this fills anew."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = call()
    return graph.replay, results

"""What a step of the CUDA walks takes alone, without the products around them: for micro.py."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import partial

import torch

import fastlstm
from fastlstm import cuda
from fastlstm.cli.timing import cuda_seconds_per_call, quartiles, seconds_per_call
from gpu.common import KERNELS, setting, synchronize

# (T, B, H): what issues and other projects name; FlashRNN publishes the last.
SHAPES = (
    *((512, 1, 256), (512, 16, 256), (512, 16, 512), (512, 64, 512)),
    *((512, 64, 1024), (1024, 16, 768)),
)
DRY = ((2, 3, 24),)


def walks(device: torch.device) -> Iterator[dict[str, object]]:
    """A row for each shape, kind of kernel and walk; why not, where the device can't serve it."""
    if (reason := cuda.missing()) is not None:
        yield {"what": "cuda walk", "missing": reason}
        return
    for steps, batch, hidden in SHAPES if device.type == "cuda" else DRY:
        for kernel in KERNELS:
            row = dict(what="cuda walk", kernel=kernel, steps=steps, batch=batch, hidden=hidden)
            plan = ("bfloat16", hidden, 1, batch, kernel)
            if reason := torch.ops.fastlstm_cuda.refusal(*plan):
                yield row | {"missing": reason}
                continue
            for name, given in called_by_a_step(device, kernel, steps, batch, hidden).items():
                backward = name == "backward"
                found = dict(walk=name, plan=torch.ops.fastlstm_cuda.plan(backward, *plan))
                yield row | found | {"microseconds_per_step": per_step(name, given, device)}


def called_by_a_step(
    device: torch.device, kernel: str, steps: int, batch: int, hidden: int
) -> dict[str, dict[str, object]]:
    """What a training step of a layer hands to its two walks."""
    made = dict(device=device, dtype=torch.bfloat16)
    module = fastlstm.LSTM(hidden, hidden, backend="cuda", **made)
    x = torch.randn(steps, batch, hidden, **made)
    found: dict[str, dict[str, object]] = {}

    def keeping(name: str, op: Callable[..., None]) -> Callable[..., None]:
        def call(**given: object) -> None:
            found[name] = given
            op(**given)

        return call

    with contextlib.ExitStack() as stack:
        stack.enter_context(setting(cuda, "KERNEL", kernel))
        ops = torch.ops.fastlstm_cuda
        for name in ("forward", "backward"):
            stack.enter_context(setting(ops, name, keeping(name, getattr(ops, name))))
        module(x)[0].sum().backward()
    found["forward"]["reserve"] = False  # as inference; and the inputs' share stays as it is
    return found


def per_step(name: str, given: dict[str, object], device: torch.device) -> dict[str, float]:
    """Quartiles of microseconds."""
    clock = cuda_seconds_per_call if device.type == "cuda" else seconds_per_call
    walk, flags = partial(getattr(torch.ops.fastlstm_cuda, name), **given), given["flags"]
    seconds = [clock(walk, flags.zero_, 1) for _ in range(8)][1:]
    synchronize(device)
    cuda.check(device)
    return quartiles([s / given["steps"] * 1e6 for s in seconds])._asdict()

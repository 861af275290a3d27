"""A step of ``make gpu``: the ``cuda`` backend under load and under compute-sanitizer.

Stress as in stress.py, for each of its two kinds of kernels, then memcheck and racecheck over
small layers of every dtype and of both kinds; all in OUT/cuda.json.
"""

from __future__ import annotations

import contextlib
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from itertools import product
from time import monotonic

import torch
from recording import SKIPPED, arguments, write_json
from torch import nn

from fastlstm import LSTM, cuda
from gpu.common import KERNELS, device_of, setting, synchronize
from gpu.stress import (
    Skipped,
    Stress,
    expect_same,
    given_up,
    large_offsets,
    near_stock,
    repeated,
    train,
    two_streams,
)

SANITIZED = "--sanitized"  # given to this file by itself: run the layers that are to be watched
# (T, B, H): one block and several, one slice and several.
LAYERS = ((3, 2, 8), (4, 19, 72))
# The grid's operands in shared memory too; the widest cluster.
WIDE = {"grid": lambda dtype: (2, 9, 520), "cluster": lambda dtype: (2, 9, 1024 // dtype.itemsize)}


class CudaStress(Stress):
    """The same layer for this backend."""

    waits = cuda

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self.dtype = torch.bfloat16

    def module(self, inputs: int | None = None, **config: object) -> nn.Module:
        return super().module(inputs, **{"backend": "cuda", **config})

    def check(self) -> None:
        synchronize(self.device)
        cuda.check(self.device)

    def given_up(self) -> contextlib.AbstractContextManager[object]:
        return setting(cuda, "POLLS", 0)


def graph(stress: Stress) -> str:
    """Captured once and replayed on new inputs: the bits of a plain call."""
    stress.cuda_only()
    steps, rounds = 500, 5
    module, x, dy = stress.module(), stress.input(steps), stress.input(steps)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            train(module, x, dy)
    torch.cuda.current_stream().wait_stream(side)
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured):
        results = train(module, x, dy)
    for _ in range(rounds):
        x.copy_(torch.randn_like(x))
        captured.replay()
        stress.check()
        expect_same([t.clone() for t in results], train(module, x, dy), "replay")
    return f"T={steps}, {rounds} replays"


def lacking(kernel: str, device: torch.device) -> str | None:
    """Why this device has no kernels of a kind, or None."""
    clusters = device.type != "cuda" or torch.cuda.get_device_capability(device) >= (9, 0)
    return None if clusters or kernel != "cluster" else "this GPU has no thread block clusters"


def sanitizer(tool: str, kernels: Sequence[str]) -> Callable[[Stress, float], str]:
    """``tool`` of compute-sanitizer over small walks of these kinds, which all share its start."""

    def case(stress: Stress, seconds: float) -> str:
        stress.cuda_only()
        found = shutil.which("compute-sanitizer")
        if found is None:
            raise Skipped("compute-sanitizer is not installed")
        words = [found, "--tool", tool, "--error-exitcode", "9", "--kernel-name", "kns=lstm_"]
        done = subprocess.run(
            [*words, sys.executable, "-P", "-m", "gpu.cuda", SANITIZED, *kernels],
            capture_output=True, text=True, timeout=max(1.0, seconds),
        )  # fmt: skip
        if done.returncode != 0:
            raise AssertionError((done.stdout + done.stderr)[-800:])
        return done.stdout.strip().splitlines()[-1]

    case.__name__ = tool
    return case


def sanitized(device: torch.device, kernel: str) -> str:
    """What the sanitizer watches: forward and backward, packed and with resets."""
    torch.set_float32_matmul_precision("high")
    dtypes = (torch.bfloat16, torch.float16, torch.float32)
    for layer, dtype in product((*LAYERS, WIDE[kernel]), dtypes):
        steps, batch, hidden = layer(dtype) if callable(layer) else layer
        made = dict(device=device, dtype=dtype)
        module = LSTM(hidden, hidden, bidirectional=True, backend="cuda", **made)
        x = torch.randn(steps, batch, hidden, **made, requires_grad=True)
        lengths = torch.linspace(steps, 1, batch).long()
        reset = torch.rand(steps, batch, device=device) < 0.3
        with setting(cuda, "KERNEL", kernel):
            for options in (dict(lengths=lengths), dict(reset=reset)):
                module(x, **options)[0].sum().backward()
        synchronize(device)
        cuda.check(device)
    return f"{len(dtypes) * (len(LAYERS) + 1)} layers of {kernel} kernels"


CASES = (repeated, near_stock, two_streams, graph, given_up, large_offsets)
TOOLS = ("memcheck", "racecheck")


def run_case(kernel: str, case: Callable[..., str], *args: object) -> dict[str, object]:
    """How it went; whatever was raised is the message."""
    begin = monotonic()
    torch.manual_seed(0)
    try:
        with setting(cuda, "KERNEL", kernel):
            result, message = "ok", case(*args)
    except Skipped as reason:
        result, message = "skipped", str(reason)
    except Exception as error:  # the other cases are run all the same
        result, message = "failed", f"{type(error).__name__}: {error}"[:1000]
    seconds = round(monotonic() - begin, 2)
    how = {"result": result, "message": message, "seconds": seconds}
    return {"kernel": kernel, "case": case.__name__, **how}


def todo(device: torch.device, deadline: float) -> Iterator[tuple[str, Callable[..., str], tuple]]:
    """Kernel, case and its arguments, the sanitizer's last."""
    stress = CudaStress(device)
    kernels = [kernel for kernel in KERNELS if lacking(kernel, device) is None]
    for kernel, case in product(kernels, CASES):
        yield kernel, case, (stress,)
    for tool in TOOLS:
        yield "best", sanitizer(tool, kernels), (stress, deadline - monotonic())


def main() -> int:
    if SANITIZED in sys.argv:
        kernels = sys.argv[sys.argv.index(SANITIZED) + 1 :]
        print("; ".join(sanitized(device_of("cuda"), kernel) for kernel in kernels))
        return 0
    args = arguments(__doc__)
    reason = cuda.missing()
    if reason is not None:
        print(f"nothing to test: {reason}")
        return SKIPPED
    device = device_of(args.device)
    rows: list[dict[str, object]] = [
        {"kernel": kernel, "case": "all", "result": "skipped", "message": reason}
        for kernel in KERNELS
        if (reason := lacking(kernel, device)) is not None
    ]
    for kernel, case, given in todo(device, args.deadline):
        if monotonic() > args.deadline:
            late = {"result": "failed", "message": "no time was left"}
            rows.append({"kernel": kernel, "case": case.__name__, **late})
        else:
            rows.append(run_case(kernel, case, *given))
        write_json(args.out / "cuda.json", rows)
        print(rows[-1], flush=True)
    return int(any(row["result"] == "failed" for row in rows))


if __name__ == "__main__":
    sys.exit(main())

"""A step of ``make gpu``: the ``cuda`` backend under load and under compute-sanitizer.

Stress as in gpu_stress.py, then memcheck and racecheck over small layers of every dtype; all in
OUT/cuda.json.
"""

from __future__ import annotations

import contextlib
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from itertools import product
from time import monotonic

import torch
from gpu_common import device_of, synchronize
from gpu_stress import Skipped, Stress, expect_same, large_offsets, near_stock, train, two_streams
from recording import SKIPPED, arguments, write_json
from torch import nn

from fastlstm import LSTM, cuda

SANITIZED = "--sanitized"  # given to this file by itself: run the layers that are to be watched
# (T, B, H): one block and several, one slice and several, operands in shared memory.
LAYERS = ((3, 2, 8), (4, 19, 72), (2, 9, 520))


class CudaStress(Stress):
    """The same layer for this backend."""

    def module(self, inputs: int | None = None, **config: object) -> nn.Module:
        return super().module(inputs, **{"backend": "cuda", **config})


@contextlib.contextmanager
def setting(name: str, value: int) -> Iterator[None]:
    """``cuda.NAME`` for a while."""
    before = getattr(cuda, name)
    setattr(cuda, name, value)
    try:
        yield
    finally:
        setattr(cuda, name, before)


def repeated(stress: Stress) -> str:
    """The same bits every time, whatever the delays, forward and backward."""
    module, x = stress.module(bidirectional=True), stress.input()
    dy = torch.cat([stress.input(), stress.input()], -1)
    want = train(module, x, dy)
    if not all(t.isfinite().all() for t in want):
        raise AssertionError("a result is not finite")
    delays = (2,) if stress.dry else (0, 0, 1, 3, 10, 30, 100)
    for jitter in delays:
        with setting("JITTER", jitter):
            got = train(module, x, dy)
            synchronize(stress.device)
        cuda.check(stress.device)
        expect_same(got, want, f"delays up to {jitter}")
    return f"T={stress.steps}, {len(delays) + 1} runs"


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
        synchronize(stress.device)
        cuda.check(stress.device)
        expect_same([t.clone() for t in results], train(module, x, dy), "replay")
    return f"T={steps}, {rounds} replays"


def given_up(stress: Stress) -> str:
    """A wait that is too long is reported, once, and the next call is served."""
    module, x = stress.module(), stress.input(min(stress.steps, 1000))
    with torch.no_grad():
        want = [module(x)[0]]
        with setting("POLLS", 0):
            module(x)
            synchronize(stress.device)
        try:
            cuda.check(stress.device)
        except RuntimeError as error:
            message = str(error)
        else:
            raise AssertionError("nothing was reported")
        got = [module(x)[0]]
        synchronize(stress.device)
    cuda.check(stress.device)
    expect_same(got, want, "the call after the report")
    return message


def sanitizer(tool: str) -> Callable[[Stress, float], str]:
    """``tool`` of compute-sanitizer over the walks of LAYERS."""

    def case(stress: Stress, seconds: float) -> str:
        stress.cuda_only()
        found = shutil.which("compute-sanitizer")
        if found is None:
            raise Skipped("compute-sanitizer is not installed")
        words = [found, "--tool", tool, "--error-exitcode", "9", "--kernel-name", "kns=lstm_"]
        done = subprocess.run(
            [*words, sys.executable, __file__, SANITIZED],
            capture_output=True, text=True, timeout=max(1.0, seconds),
        )  # fmt: skip
        if done.returncode != 0:
            raise AssertionError((done.stdout + done.stderr)[-800:])
        return done.stdout.strip().splitlines()[-1]

    case.__name__ = tool
    return case


def sanitized(device: torch.device) -> None:
    """What the sanitizer watches: forward and backward, packed and with resets."""
    torch.set_float32_matmul_precision("high")
    dtypes = (torch.bfloat16, torch.float16, torch.float32)
    for (steps, batch, hidden), dtype in product(LAYERS, dtypes):
        made = dict(device=device, dtype=dtype)
        module = LSTM(hidden, hidden, bidirectional=True, backend="cuda", **made)
        x = torch.randn(steps, batch, hidden, **made, requires_grad=True)
        lengths = torch.linspace(steps, 1, batch).long()
        module(x, lengths=lengths)[0].sum().backward()
        reset = torch.rand(steps, batch, device=device) < 0.3
        module(x, reset=reset)[0].sum().backward()
        synchronize(device)
        cuda.check(device)


CASES = (repeated, near_stock, two_streams, graph, given_up, large_offsets)
TOOLS = ("memcheck", "racecheck")


def run_case(case: Callable[..., str], *args: object) -> dict[str, object]:
    """How it went; whatever was raised is the message."""
    begin = monotonic()
    torch.manual_seed(0)
    try:
        result, message = "ok", case(*args)
    except Skipped as reason:
        result, message = "skipped", str(reason)
    except Exception as error:  # the other cases are run all the same
        result, message = "failed", f"{type(error).__name__}: {error}"[:1000]
    seconds = round(monotonic() - begin, 2)
    return {"case": case.__name__, "result": result, "message": message, "seconds": seconds}


def main() -> int:
    if SANITIZED in sys.argv:
        sanitized(device_of("cuda"))
        return 0
    args = arguments(__doc__)
    reason = cuda.missing()
    if reason is not None:
        print(f"nothing to test: {reason}")
        return SKIPPED
    device = device_of(args.device)
    stress = CudaStress(device)
    if stress.dry:
        stress.dtype = torch.bfloat16
    rows: list[dict[str, object]] = []
    todo = [(case, lambda: (stress,)) for case in CASES]
    todo += [(sanitizer(tool), lambda: (stress, args.deadline - monotonic())) for tool in TOOLS]
    for case, given in todo:
        if monotonic() > args.deadline:
            rows.append({"case": case.__name__, "result": "failed", "message": "no time was left"})
        else:
            rows.append(run_case(case, *given()))
        write_json(args.out / "cuda.json", rows)
        print(rows[-1], flush=True)
    return int(any(row["result"] == "failed" for row in rows))


if __name__ == "__main__":
    sys.exit(main())

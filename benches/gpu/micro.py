"""A step of ``make gpu``: what walks are made of, in OUT/micro.json.

The barrier of kernels/barrier.py, by programs that do nothing but arrive and wait for each other.
A walk in one launch, with a launch for each exchange, and the latter captured in a graph. And what
clusters of thread blocks cost, which Triton has not: clusters.cu, where nvcc is there. And the
walks of the cuda backend alone: walks.py.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from time import perf_counter

import torch
import triton
import triton.language as tl
from recording import arguments, write_json

import fastlstm
from fastlstm.cli.timing import cuda_seconds_per_call, quartiles, seconds_per_call
from fastlstm.kernels.barrier import arrive, wait
from fastlstm.kernels.launch import POLLS
from gpu import walks
from gpu.common import by_exchanges, captured, device_of, synchronize

CLUSTERS = Path(__file__).with_name("clusters.cu")

PROGRAMS = (8, 16, 32, 64, 128)


@triton.jit(do_not_specialize=["exchanges", "polls", "jitter"])
def barriers(counter, fault, exchanges: tl.int32, polls: tl.int32, jitter: tl.int32):
    """``exchanges`` times, every program waits for all."""
    programs = tl.num_programs(0)
    exchange = exchanges * 0
    while exchange < exchanges:
        place = (exchange.to(tl.int64) << 24) | 1
        wait(counter, exchange, programs, False, fault, place, polls, jitter, exchange)
        arrive(counter, False)
        exchange += 1


def barrier(programs: int, exchanges: int, device: torch.device) -> dict[str, object]:
    """Microseconds for a barrier, and whether all came to it."""
    counter = torch.zeros(1, dtype=torch.int64, device=device)
    fault = torch.zeros_like(counter)
    cuda = device.type == "cuda"
    cooperative = dict(launch_cooperative_grid=True) if cuda else {}

    def run() -> None:
        barriers[(programs,)](counter, fault, exchanges, POLLS, 0, num_warps=8, **cooperative)

    clock = cuda_seconds_per_call if cuda else seconds_per_call
    seconds = [clock(run, counter.zero_, 1) for _ in range(8)][1:]  # the first compiles
    synchronize(device)
    row: dict[str, object] = {"what": "barrier", "programs": programs, "exchanges": exchanges}
    if int(fault) or int(counter) != programs * exchanges:
        return row | {"error": f"{int(counter)} arrivals, fault word {int(fault)}"}
    return row | {"microseconds": quartiles([s / exchanges * 1e6 for s in seconds])._asdict()}


def walk(device: torch.device) -> Iterator[dict[str, object]]:
    """Microseconds per step on the device, and of a call on the host."""
    cuda = device.type == "cuda"
    steps, batch, hidden = (512, 16, 512) if cuda else (2, 2, 20)
    made = dict(device=device, dtype=torch.bfloat16 if cuda else torch.float32)
    module = fastlstm.LSTM(hidden, hidden, backend="triton", **made)
    x = torch.randn(steps, batch, hidden, **made)

    def call() -> None:
        with torch.no_grad():
            module(x)

    def timed(what: str, run: Callable[[], object]) -> dict[str, object]:
        clock = cuda_seconds_per_call if cuda else seconds_per_call
        seconds = [clock(run, lambda: None, 1) for _ in range(8)][1:]
        host = []
        for _ in range(7):
            synchronize(device)
            begin = perf_counter()
            run()
            host.append(perf_counter() - begin)
        synchronize(device)
        return {
            **dict(what=what, steps=steps, batch=batch, hidden=hidden),
            "microseconds_per_step": quartiles([s / steps * 1e6 for s in seconds])._asdict(),
            "host_microseconds": quartiles([s * 1e6 for s in host])._asdict(),
        }

    yield timed("walk", call)
    if not cuda:
        return
    yield timed("walk in a graph", captured(call)[0])
    with by_exchanges():
        yield timed("walk by exchanges", call)
        yield timed("walk by exchanges in a graph", captured(call)[0])


def find_nvcc() -> str | None:
    """CUDA's compiler, on the path or where it is installed."""
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    places = [None, *(os.path.join(home, "bin") for home in homes if home)]
    return next(filter(None, (shutil.which("nvcc", path=place) for place in places)), None)


def build_clusters(nvcc: str, capability: tuple[int, int], program: str) -> str | None:
    """Compile clusters.cu; what went wrong, or None."""
    arch = f"{capability[0]}{capability[1]}a"
    target = f"-gencode=arch=compute_{arch},code=sm_{arch}"
    words = [nvcc, "-O3", "-std=c++17", target, "-o", program, str(CLUSTERS)]
    done = subprocess.run(words, capture_output=True, text=True)
    return (done.stdout + done.stderr)[-400:] if done.returncode else None


def clusters(device: torch.device) -> list[dict[str, object]]:
    """What clusters.cu prints, or what is missing for it."""
    row: dict[str, object] = {"what": "clusters"}
    nvcc = find_nvcc()
    if device.type != "cuda" or (capability := torch.cuda.get_device_capability(device)) < (9, 0):
        return [row | {"missing": "a GPU of compute capability 9.0 or more"}]
    if nvcc is None:
        return [row | {"missing": "nvcc"}]
    with tempfile.TemporaryDirectory() as folder:
        program = os.path.join(folder, "clusters")
        if (problem := build_clusters(nvcc, capability, program)) is not None:
            return [row | {"error": problem}]
        done = subprocess.run([program], capture_output=True, text=True)
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    if done.returncode and not any("error" in found for found in rows):
        rows.append(row | {"error": f"exit status {done.returncode}: {done.stderr[-200:]}"})
    return rows


def parts(device: torch.device) -> Iterator[dict[str, object]]:
    """Every row of micro.json."""
    cuda = device.type == "cuda"
    # The interpreter runs one program after the other: there only one can wait.
    for programs in PROGRAMS if cuda else (1,):
        yield barrier(programs, 10_000 if cuda else 5, device)
    yield from walk(device)
    yield from clusters(device)
    yield from walks.walks(device)


def main() -> int:
    args = arguments(__doc__)
    rows: list[dict[str, object]] = []
    for row in parts(device_of(args.device)):
        rows.append(row)
        write_json(args.out / "micro.json", rows)
        print(row, flush=True)
    return int(any("error" in row for row in rows))


if __name__ == "__main__":
    sys.exit(main())

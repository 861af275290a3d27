"""A step of ``make gpu``: how long the barrier of kernels/barrier.py takes, in OUT/micro.json.

N programs do nothing but arrive and wait for each other.
"""

from __future__ import annotations

import sys

import torch
import triton
import triton.language as tl
from gpu_common import device_of, synchronize
from recording import arguments, write_json

from fastlstm.cli.timing import cuda_seconds_per_call, quartiles, seconds_per_call
from fastlstm.kernels.barrier import arrive, wait
from fastlstm.kernels.launch import POLLS

PROGRAMS = (8, 16, 32, 64, 128)


@triton.jit(do_not_specialize=["exchanges", "polls", "jitter"])
def barriers(counter, fault, exchanges: tl.int32, polls: tl.int32, jitter: tl.int32):
    """``exchanges`` times, every program waits for all."""
    programs = tl.num_programs(0)
    exchange = exchanges * 0
    while exchange < exchanges:
        place = (exchange.to(tl.int64) << 24) | 1
        wait(counter, exchange, programs, False, fault, place, polls, jitter)
        arrive(counter, False)
        exchange += 1


def measure(programs: int, exchanges: int, device: torch.device) -> dict[str, object]:
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
    row: dict[str, object] = {"programs": programs, "exchanges": exchanges}
    if int(fault) or int(counter) != programs * exchanges:
        return row | {"error": f"{int(counter)} arrivals, fault word {int(fault)}"}
    return row | {"microseconds": quartiles([s / exchanges * 1e6 for s in seconds])._asdict()}


def main() -> int:
    args = arguments(__doc__)
    device = device_of(args.device)
    rows = []
    # The interpreter runs one program after the other: there only one can wait.
    for programs in PROGRAMS if device.type == "cuda" else (1,):
        rows.append(measure(programs, 10_000 if device.type == "cuda" else 5, device))
        write_json(args.out / "micro.json", rows)
        print(rows[-1], flush=True)
    return int(any("error" in row for row in rows))


if __name__ == "__main__":
    sys.exit(main())

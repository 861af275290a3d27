"""A step of ``make gpu``: compiles what will be measured into Triton's cache, by many processes.

Two steps of a sequence are enough: nothing is compiled for the number of steps.
"""

from __future__ import annotations

import subprocess
import sys
from time import monotonic

from recording import SKIPPED, arguments, cpu_count


def compile_share(index: int, count: int, deadline: float) -> int:
    """Every ``count``-th case from ``index`` on; 1 if one could not be run."""
    from gpu.cases import DeviceContest, cases
    from gpu.common import device_of, synchronize

    failed = 0
    device = device_of("cuda")
    for case in cases()[index::count]:
        if monotonic() > deadline:
            print("no time for", *case)
            continue
        try:
            contest = DeviceContest(case._replace(steps=2), device)
            contest.results(contest.ours)
            synchronize(device)
        except Exception as error:  # the others are worth compiling all the same
            failed = 1
            print(*case, f"{type(error).__name__}: {error}"[:400], flush=True)
    return failed


def main() -> int:
    share = sys.argv.pop(1) if "/" in sys.argv[1] and sys.argv[1][0].isdigit() else None
    args = arguments(__doc__)
    if args.device == "cpu":
        print("nothing to compile for the interpreter")
        return SKIPPED
    if share is not None:
        index, count = map(int, share.split("/"))
        return compile_share(index, count, args.deadline)
    count = max(1, min(14, cpu_count() - 1))
    words = [sys.executable, "-P", "-m", "gpu.compile"]
    workers = [subprocess.Popen([*words, f"{k}/{count}", *sys.argv[1:]]) for k in range(count)]
    statuses = [worker.wait() for worker in workers]
    return int(any(statuses))


if __name__ == "__main__":
    sys.exit(main())

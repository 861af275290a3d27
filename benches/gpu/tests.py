"""A step of ``make gpu``: the tests on the device, in several processes, since kernels compile.

Leaves a log and, of a process that came to its end, a junit file of each; OUT/tests.json counts.
(others.py does the same for tests of the CPU's tensors, as OUT/others.json.)
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import subprocess
import sys
import xml.etree.ElementTree as ET
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from time import monotonic

from recording import ROOT, SKIPPED, arguments, cpu_count, write_json

# What compiles nothing comes first, so that a limit cuts neither backend's.
DEVICE_TESTS = ("test_cuda_kernels.py", "test_cuda_cluster.py", "test_gate_math.py")
DEVICE_TESTS += ("test_triton_kernels.py",)
DRY = ("test_triton_kernels.py", "-k", "test_plan or test_jitter or test_rows_lie")


def start(
    name: str, selected: list[str], out: Path, index: int, count: int, log: object
) -> subprocess.Popen:
    """One pytest process."""
    words = [sys.executable, "-P", "-m", "pytest", "-v", "-p", "shard", "-p", "no:cacheprovider"]
    words.append("--continue-on-collection-errors")
    tests = [f"tests/{word}" if word.endswith(".py") else word for word in selected]
    report = f"--junit-xml={out / f'{name}-{index}.xml'}"
    env = os.environ | {"SHARD": f"{index}/{count}", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [*words, report, *tests], cwd=ROOT, env=env, stdout=log, stderr=subprocess.STDOUT
    )


def counts(path: Path) -> dict[str, object]:
    """What a junit file says, or the log of a process that was cut or crashed."""
    if not path.is_file():
        log = path.with_suffix(".log").read_text(encoding="utf-8", errors="replace")
        ended = Counter(re.findall(r" (PASSED|FAILED|ERROR|SKIPPED) +\[", log))
        return {"error": f"no {path.name}: cut or crashed", "until_then": dict(ended)}
    suites = list(ET.parse(path).getroot().iter("testsuite"))
    found: dict[str, object] = {
        name: sum(int(suite.get(name, 0)) for suite in suites)
        for name in ("tests", "failures", "errors", "skipped")
    }
    failed = [
        f"{case.get('classname')}::{case.get('name')}"
        for suite in suites
        for case in suite.iter("testcase")
        if case.find("failure") is not None or case.find("error") is not None
    ]
    return found | {"failed": failed}


def run(args: argparse.Namespace, name: str, selected: Sequence[str]) -> int:
    """All those that are selected; the exit status. The dry run has one process."""
    if importlib.util.find_spec("pytest") is None:
        print("no tests: pytest is not installed")
        return SKIPPED
    count = 1 if args.device == "cpu" else max(1, min(14, cpu_count() - 2))
    for old in args.out.glob(f"{name}-*.xml"):
        old.unlink()
    with ExitStack() as stack:
        logs = [
            stack.enter_context(open(args.out / f"{name}-{k}.log", "w", encoding="utf-8"))
            for k in range(count)
        ]
        processes = [
            start(name, list(selected), args.out, k, count, log) for k, log in enumerate(logs)
        ]
        statuses: list[int | None] = []
        for process in processes:
            try:
                statuses.append(process.wait(max(0.1, args.deadline - monotonic())))
            except subprocess.TimeoutExpired:
                process.kill()
                statuses.append(None)
    rows = [
        {"process": k, "status": status, **counts(args.out / f"{name}-{k}.xml")}
        for k, status in enumerate(statuses)
    ]
    write_json(args.out / f"{name}.json", rows)
    print(*rows, sep="\n")
    return int(any(status != 0 for status in statuses))


def main() -> int:
    args = arguments(__doc__)
    return run(args, "tests", DRY if args.device == "cpu" else DEVICE_TESTS)


if __name__ == "__main__":
    sys.exit(main())

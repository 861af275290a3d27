"""A step of ``make gpu``: the tests on the device, in several processes, since kernels compile.

Leaves a log and, of a process that came to its end, a junit file of each; OUT/tests.json counts.
"""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
import xml.etree.ElementTree as ET
from collections import Counter
from contextlib import ExitStack
from pathlib import Path
from time import monotonic

from recording import ROOT, SKIPPED, arguments, cpu_count, write_json

DEVICE_TESTS = ("test_triton_kernels.py", "test_gate_math.py", "test_triton_protocol.py")
DEVICE_TESTS += ("test_cuda_kernels.py", "test_cuda_cluster.py")
# Of the CPU's tensors, but with this machine's torch.
OTHER_TESTS = (
    *("test_module.py", "test_functional.py", "test_autograd.py"),
    *("test_triton_launch.py", "test_dispatch.py"),
)
DRY = ("test_triton_kernels.py", "-k", "test_plan or test_jitter or test_rows_lie")


def start(selected: list[str], out: Path, index: int, count: int, log: object) -> subprocess.Popen:
    """One pytest process."""
    words = [sys.executable, "-P", "-m", "pytest", "-v", "-p", "shard", "-p", "no:cacheprovider"]
    words.append("--continue-on-collection-errors")
    tests = [f"tests/{word}" if word.endswith(".py") else word for word in selected]
    report = f"--junit-xml={out / f'tests-{index}.xml'}"
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


def main() -> int:
    args = arguments(__doc__)
    if importlib.util.find_spec("pytest") is None:
        print("no tests: pytest is not installed")
        return SKIPPED
    dry = args.device == "cpu"
    selected = list(DRY if dry else (*DEVICE_TESTS, *OTHER_TESTS))
    count = 1 if dry else max(1, min(14, cpu_count() - 2))
    for old in args.out.glob("tests-*.xml"):
        old.unlink()
    with ExitStack() as stack:
        logs = [
            stack.enter_context(open(args.out / f"tests-{k}.log", "w", encoding="utf-8"))
            for k in range(count)
        ]
        processes = [start(selected, args.out, k, count, log) for k, log in enumerate(logs)]
        statuses: list[int | None] = []
        for process in processes:
            try:
                statuses.append(process.wait(max(0.1, args.deadline - monotonic())))
            except subprocess.TimeoutExpired:
                process.kill()
                statuses.append(None)
    rows = [
        {"process": k, "status": status, **counts(args.out / f"tests-{k}.xml")}
        for k, status in enumerate(statuses)
    ]
    write_json(args.out / "tests.json", rows)
    print(*rows, sep="\n")
    return int(any(status != 0 for status in statuses))


if __name__ == "__main__":
    sys.exit(main())

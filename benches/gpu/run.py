"""``make gpu OUT=dir``: tests, stresses and measures the kernels for GPUs on one.

Needs python with torch, triton and nothing else: installs nothing, asks no network. Every step is
a process with a time limit of its own, so that one that hangs or crashes leaves the others. What is
finished is in OUT after each: a few files to read first, and all of them, logs too, in one archive.
The exit status is 1 if any step failed; all are run.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from time import monotonic
from typing import NamedTuple

from recording import ROOT, SKIPPED, write_json

BENCHES = Path(__file__).resolve().parent.parent
BUDGET = 560  # seconds, all steps together
GRACE = 8  # seconds before its limit that a step is told to come to its end


class Step(NamedTuple):
    """One process."""

    name: str
    limit: int  # seconds; the last step has all that others left
    command: Sequence[str]


def steps(device: str, out: Path) -> list[Step]:
    """The split of BUDGET, and what is run in this order."""
    split = (
        ("build", 120),  # libraries: for the CPU, which some tests compare with, and of CUDA C++
        ("describe", 30),
        ("compile", 60),  # the kernels to be measured, many at a time
        ("tests", 90),
        ("stress", 45),
        ("cuda", 85),  # the same for both kinds of CUDA kernels, and compute-sanitizer
        ("micro", 35),  # compiles a program of CUDA C++
        ("others", 40),  # tests that say nothing about kernels
        ("measure", 55),
    )
    return [Step(name, limit, command(name, device, out)) for name, limit in split]


def command(name: str, device: str, out: Path) -> list[str]:
    module = ["-P", "-m", f"gpu.{name}"]
    return [sys.executable, *module, "--device", device, "--out", str(out)]


@contextlib.contextmanager
def checkout_path() -> Iterator[str]:
    """A folder from which this checkout is imported as if it were installed.

    ``fastlstm.kernels`` lies outside of fastlstm/ here; setup.py maps it, and so do these links.
    """
    with tempfile.TemporaryDirectory(prefix="fastlstm-") as folder:
        package = Path(folder) / "fastlstm"
        package.mkdir()
        own = (ROOT / "fastlstm").iterdir()
        own = [path for path in own if path.suffix in (".py", ".json") or path.name == "cli"]
        for source in (*own, ROOT / "kernels", ROOT / "csrc"):
            (package / source.name).symlink_to(source)
        yield folder


def environment(path: str, device: str, step: str) -> dict[str, str]:
    """The checkout; repeatable products where they are compared; without a GPU the interpreter."""
    given = os.environ.get("PYTHONPATH")
    found = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([path, str(BENCHES), *([given] if given else [])]),
    }
    found.pop("TRITON_INTERPRET", None)
    if step in ("stress", "cuda"):  # cuDNN may be slower with it, so not where it is timed
        found["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
    # A dry run leaves a GPU alone, should there be one.
    dry = {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    return found | (dry if device == "cpu" else {})


def run_step(step: Step, out: Path, seconds: float, env: dict[str, str]) -> dict[str, object]:
    """Run it and say how it ended; its output is in OUT/NAME.log."""
    begin, status = monotonic(), None
    told = [*step.command, "--seconds", f"{max(1.0, seconds - GRACE):.0f}"]
    with open(out / f"{step.name}.log", "w", encoding="utf-8") as log:
        process = subprocess.Popen(
            told, cwd=ROOT, env=env, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            status = process.wait(seconds)
        except subprocess.TimeoutExpired:
            log.write(f"\ncut after {seconds:.0f} s\n")
        finally:  # its own children too, however it ended
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    words = {None: "cut", 0: "ok", SKIPPED: "skipped"}
    return {
        "step": step.name,
        "result": words.get(status, "failed"),
        "status": status,
        "seconds": round(monotonic() - begin, 1),
        "limit": round(seconds, 1),
    }


# Of a run's files, what is read first.
FIRST = ("steps.json", "machine.json", "gpu-*")


def publish(work: Path, out: Path) -> None:
    """What there is so far. (Who lends a GPU may hand back a few files only.)"""
    for path in (path for pattern in FIRST for path in work.glob(pattern)):
        shutil.copy(path, out)
    partial = out / "all.tar.gz.partial"
    with tarfile.open(partial, "w:gz") as archive:
        archive.add(work, arcname="all")
    os.replace(partial, out / "all.tar.gz")


def run_all(
    todo: Sequence[Step],
    out: Path,
    device: str,
    budget: float = BUDGET,
    after: Callable[[], None] = lambda: None,
) -> int:
    """Run all steps, keep OUT/steps.json up to date, and return the exit status.

    ``after`` is called after each.
    """
    deadline, results = monotonic() + budget, []
    with checkout_path() as path:
        for step in todo:
            left = deadline - monotonic()
            seconds = left if step is todo[-1] else min(step.limit, left)
            print(f"{step.name}: at most {seconds:.0f} s", flush=True)
            results.append(
                run_step(step, out, max(seconds, 1.0), environment(path, device, step.name))
            )
            write_json(out / "steps.json", results)
            try:
                after()
            except OSError as error:  # the others are run all the same
                print(f"{step.name}: not handed on: {error}", flush=True)
            print(f"{step.name}: {results[-1]['result']}, {results[-1]['seconds']} s", flush=True)
            if results[-1]["result"] != "ok":
                print(tail(out / f"{step.name}.log"), flush=True)
    return int(any(result["result"] not in ("ok", "skipped") for result in results))


def tail(path: Path, lines: int = 15) -> str:
    """The end of a log, indented."""
    text = path.read_text(encoding="utf-8", errors="replace").splitlines()[-lines:]
    return "\n".join(f"    {line}" for line in text)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER")
    parser.add_argument(
        "--device", choices=("cuda", "cpu"), default="cuda",
        help="cpu: a dry run, tiny and in Triton's interpreter; its figures mean nothing",
    )  # fmt: skip
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # ends the step too
    out = args.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="fastlstm-gpu-") as folder:
        work = Path(folder)
        todo = steps(args.device, work)
        try:
            return run_all(todo, work, args.device, after=lambda: publish(work, out))
        except BaseException:  # what a step has written that is ended with us
            publish(work, out)
            raise


if __name__ == "__main__":
    sys.exit(main())

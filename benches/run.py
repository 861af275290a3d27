"""Times fastlstm against torch.nn.LSTM, itself and others: same weights, same inputs, paired.

Each row is checked before it is timed: one whose outputs or gradients differ beyond the tolerance
of fastlstm/cli/compare.py is not timed, and the exit status is 1.  Writes JSON, Markdown and plots
to --out.  The whole takes less than ten minutes on two cores; --only measures a part of it, and
--add has those rows replaced in a run recorded before, by the same code on the same machine.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

import fastlstm
from fastlstm import build, native
from fastlstm.cli.arguments import (
    DTYPES,
    Parser,
    cpu_count,
    seconds_of,
    shape_of,
    threads_of,
)
from fastlstm.cli.contest import MODES, Row
from fastlstm.cli.info import VARIABLES, cpu_model

sys.path.append(str(Path(__file__).resolve().parent.parent / "tests"))

import limits
from parts import PARTS, Job
from peers import PEERS, standing
from recording import ROOT, commit, now, stem, write_json
from report import Result, report

from cases import SPEED

try:
    from tqdm import tqdm
except ImportError:  # a bar is a comfort only
    tqdm = None

EPILOG = """\
--instruction-set holds back fastlstm only.  To compare like with like, hold torch back too:
  ONEDNN_MAX_CPU_ISA=AVX2 MKL_ENABLE_INSTRUCTIONS=AVX2 ATEN_CPU_CAPABILITY=avx2 \\
    python benches/run.py --instruction-set avx2
These variables are recorded with the result."""
# What must be the same in a run that rows are added to.
SAME = ("hardware", "versions", "instruction_sets", "environment")


def describe(args: argparse.Namespace) -> Result:
    """What the figures depend on."""
    return {
        "date": now(),
        "hardware": {
            "cpu": cpu_model(),
            "cpus": cpu_count(),
            "machine": platform.machine(),
            "caches": limits.caches(),
        },
        "versions": {
            "fastlstm": fastlstm.__version__,
            "commit": commit(),
            "torch": str(torch.__version__),
            "python": platform.python_version(),
            "compiler": build.find_toolchain().compiler_version,
        },
        "instruction_sets": {
            "fastlstm": args.instruction_set,
            "available": list(native.instruction_sets()),  # as JSON has it
            "torch": torch.backends.cpu.get_cpu_capability(),
        },
        "environment": {name: os.environ[name] for name in VARIABLES if name in os.environ},
        "peers": {peer.name: standing(peer) for peer in PEERS},
        "limits": {},
        "rows": [],
    }


def measure(args: argparse.Namespace, result: Result) -> None:
    """Add the rows of args.only, and the limits for their numbers of threads, to a result."""
    machine = limits.compiled(args.instruction_set)
    jobs = [(part, job) for part in args.only for job in PARTS[part](args)]
    for count in sorted({job.threads for _, job in jobs}):
        if str(count) not in result["limits"]:
            torch.set_num_threads(count)
            caches = result["hardware"]["caches"]
            result["limits"][str(count)] = limits.measure(machine, count, caches)
    found: list[Row] = []
    for _, job in progress(jobs):
        torch.set_num_threads(job.threads)
        several = job.threads > 1
        before = limits.hop(machine) if several else 0.0
        rows = list(job.rows())
        hops = {"hop_ns": [before, limits.hop(machine)]} if several else {}
        found += [row | hops for row in rows]
    order = [*PARTS]
    kept = [row for row in result["rows"] if row["part"] not in args.only]
    modes = [*MODES]
    result["rows"] = sorted(
        kept + found,
        key=lambda row: (order.index(row["part"]), row["threads"], modes.index(row["mode"])),
    )


def progress(jobs: list[tuple[str, Job]]) -> Iterable[tuple[str, Job]]:
    """The jobs, with a bar that names the part."""
    bar = jobs if tqdm is None else tqdm(jobs, unit="job")
    for part, job in bar:
        if tqdm is not None:
            bar.set_description(part)
        yield part, job


def parse_args() -> argparse.Namespace:
    """Arguments, and the instruction set put to use."""
    parser = Parser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add, threads = parser.add_argument, sorted({1, min(2, cpu_count())})
    standard = [part for part in PARTS if part != "random"]
    add("--only", nargs="+", choices=standard, metavar="PART", help=", ".join(standard))
    add("--add", type=Path, metavar="RESULT.json", help="replace those rows in it; write it anew")
    add("--shapes", nargs="+", type=shape_of, metavar="T,B,I,H", help="only speed, of these")
    add("--random", type=int, metavar="N", help="only N random shapes, the worst listed first")
    add("--seed", type=int, default=0, help="of --random (default 0)")
    add("--threads", nargs="+", type=threads_of, default=threads, metavar="N")
    add("--modes", nargs="+", choices=tuple(MODES), default=tuple(MODES))
    add("--dtype", choices=DTYPES, default="float32", help="of --shapes, --random and speed")
    add("--seconds", type=seconds_of, default=1.0, help="for each row, at least (default 1)")
    add("--instruction-set", metavar="NAME", help="of the library, not of torch; see below")
    add("--out", type=Path, default=ROOT / "benches" / "results", metavar="FOLDER")
    args = parser.parse_args()
    if args.random is not None:
        args.only = ["random"]
    elif args.shapes is not None and args.only is None:
        args.only = ["speed"]
    args.only = args.only or standard
    args.shapes = args.shapes or SPEED
    missing = fastlstm.available_backends()["cpu"]
    if missing is not None:
        parser.error(f"nothing to time: {missing}")
    names = native.instruction_sets()
    args.instruction_set = args.instruction_set or names[0]
    if args.instruction_set not in names:
        parser.error(
            f"--instruction-set: got {args.instruction_set!r}, expected one of {', '.join(names)}"
        )
    try:
        args.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"--out: {error.strerror}")
    native.use_instruction_set(args.instruction_set)
    args.parser = parser
    return args


def recorded(args: argparse.Namespace) -> dict[str, Any]:
    """The run of --add, which must be of the same code and machine."""
    try:
        result = json.loads(args.add.read_text(encoding="utf-8"))
        differing = [name for name in SAME if result[name] != args.described[name]]
    except (OSError, ValueError, LookupError, TypeError) as error:
        args.parser.error(f"--add: {args.add}: not a result of benches/run.py: {error}")
    if differing:
        args.parser.error(f"--add: {args.add}: another {', '.join(differing)}")
    return result


def main() -> int:
    args = parse_args()
    try:
        args.described = result = describe(args)
        if args.add is not None:
            result = recorded(args)
        measure(args, result)
    except build.BuildError as error:
        args.parser.error(str(error))
    kind = "random" if args.random is not None else "cpu"
    name = f"{stem(kind, result['date'], result['hardware']['cpu'])}.json"
    path = args.add or args.out / name
    write_json(path, result)
    sys.stdout.write(report(path, result))
    return int(any("error" in row for row in result["rows"]))


if __name__ == "__main__":
    sys.exit(main())

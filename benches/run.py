"""Times fastlstm.LSTM against torch.nn.LSTM: same weights, same inputs, paired.

Each row is checked before it is timed: one whose outputs or gradients differ from nn.LSTM's
beyond the tolerance of tests/cases.py is not timed, and the exit status is 1.  Writes JSON
and Markdown to --out.
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch

import fastlstm
from fastlstm import native
from fastlstm.cli.arguments import (
    DTYPES,
    Parser,
    Shape,
    cpu_count,
    seconds_of,
    shape_of,
    threads_of,
)
from fastlstm.cli.contest import MODES, Contest, Row
from fastlstm.cli.info import VARIABLES, cpu_model

sys.path.append(str(Path(__file__).resolve().parent.parent / "tests"))

from limits import best_matmul, copy_bandwidth
from recording import ROOT, commit, now, stem, write_json
from report import Result, markdown

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


def measure(args: argparse.Namespace, limit_dtype: torch.dtype) -> tuple[dict[str, Row], list[Row]]:
    """The limits for each thread count, and all rows."""
    limits: dict[str, Row] = {}
    rows: list[Row] = []
    todo = [(threads, shape) for threads in args.threads for shape in args.shapes]
    for threads, shape in progress(todo):
        torch.set_num_threads(threads)
        if str(threads) not in limits:
            limits[str(threads)] = {
                "matmul_gflops": best_matmul(limit_dtype),
                "copy_gbytes": copy_bandwidth(),
            }
        rows += measure_shape(args, threads, shape)
    return limits, sorted(rows, key=lambda row: args.modes.index(row["mode"]))


def measure_shape(args: argparse.Namespace, threads: int, shape: Shape) -> Iterator[Row]:
    """A row for each mode."""
    contest = Contest(shape, getattr(torch, args.dtype))
    problem = contest.problem()
    for mode in args.modes:
        row: Row = {"shape": shape, "mode": mode, "threads": threads}
        if problem is not None:
            yield row | {"error": problem}
            continue
        yield row | contest.row(shape, mode, args.seconds)


def progress(todo: list[tuple[int, Shape]]) -> Iterable[tuple[int, Shape]]:
    return todo if tqdm is None else tqdm(todo, desc="timing", unit="shape")


def describe(args: argparse.Namespace) -> Result:
    """What the figures depend on."""
    return {
        "date": now(),
        "hardware": {"cpu": cpu_model(), "cpus": cpu_count(), "machine": platform.machine()},
        "versions": {
            "fastlstm": fastlstm.__version__,
            "commit": commit(),
            "torch": str(torch.__version__),
            "python": platform.python_version(),
        },
        "instruction_sets": {
            "fastlstm": args.instruction_set,
            "available": native.instruction_sets(),
            "torch": torch.backends.cpu.get_cpu_capability(),
        },
        "environment": {name: os.environ[name] for name in VARIABLES if name in os.environ},
        "dtype": args.dtype,
        "seconds": args.seconds,
    }


def parse_args() -> argparse.Namespace:
    """Arguments, and the instruction set put to use."""
    parser = Parser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add, threads = parser.add_argument, sorted({1, min(2, cpu_count())})
    add("--shapes", nargs="+", type=shape_of, default=SPEED, metavar="T,B,I,H")
    add("--threads", nargs="+", type=threads_of, default=threads, metavar="N")
    add("--modes", nargs="+", choices=tuple(MODES), default=tuple(MODES))
    add("--dtype", choices=DTYPES, default="float32")
    add("--seconds", type=seconds_of, default=2.0, help="for each row, at least (default 2)")
    add("--instruction-set", metavar="NAME", help="of the library, not of torch; see below")
    add("--out", type=Path, default=ROOT / "benches" / "results", metavar="FOLDER")
    args = parser.parse_args()
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
    return args


def main() -> int:
    args = parse_args()
    result = describe(args)
    # Half precision is computed in float32.
    limit_dtype = torch.float64 if args.dtype == "float64" else torch.float32
    result["limit_dtype"] = str(limit_dtype).removeprefix("torch.")
    result["limits"], result["rows"] = measure(args, limit_dtype)
    path = args.out / f"{stem('cpu', result['date'], result['hardware']['cpu'])}.json"
    write_json(path, result)
    text = markdown(result, path.name)
    path.with_suffix(".md").write_text(text, encoding="utf-8")
    sys.stdout.write(text)
    return int(any("error" in row for row in result["rows"]))


if __name__ == "__main__":
    sys.exit(main())

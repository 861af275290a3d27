"""Times fastlstm.LSTM against torch.nn.LSTM: same weights, same inputs, paired.

Each row is checked before it is timed: one whose outputs or gradients differ from nn.LSTM's
beyond the tolerance of tests/cases.py is not timed, and the exit status is 1.  Writes JSON
and Markdown to --out.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import os
import platform
import re
import sys
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

import fastlstm

sys.path.append(str(Path(__file__).resolve().parent.parent / "tests"))

from recording import ROOT, commit, cpu_count, now, stem, write_json
from report import MODES, Parser, Result, Row, markdown
from timing import best_matmul, copy_bandwidth, paired, seconds_per_call

from cases import SPEED, tolerance

try:
    from tqdm import tqdm
except ImportError:  # a bar is a comfort only
    tqdm = None

DTYPES = ("float32", "float64", "float16", "bfloat16")
# What changes the code torch runs, or the threads it runs on.
VARIABLES = (
    *("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA", "MKL_ENABLE_INSTRUCTIONS", "ATEN_CPU_CAPABILITY"),
    *("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OMP_PROC_BIND", "OMP_WAIT_POLICY"),
    *("GOMP_CPU_AFFINITY", "GOMP_SPINCOUNT"),
)
EPILOG = """\
--instruction-set holds back fastlstm only.  To compare like with like, hold torch back too:
  ONEDNN_MAX_CPU_ISA=AVX2 MKL_ENABLE_INSTRUCTIONS=AVX2 ATEN_CPU_CAPABILITY=avx2 \\
    python benches/run.py --instruction-set avx2
These variables are recorded with the result."""

Shape = tuple[int, int, int, int]  # T, B, I, H


class Contest:
    """One shape: two modules with the same weights, and what both are fed."""

    clock = staticmethod(seconds_per_call)

    def __init__(self, shape: Shape, dtype: torch.dtype) -> None:
        steps, batch, inputs, hidden = shape
        torch.manual_seed(0)
        self.theirs = nn.LSTM(inputs, hidden, dtype=dtype)
        self.ours = fastlstm.LSTM(inputs, hidden, dtype=dtype)
        self.ours.load_state_dict(self.theirs.state_dict())
        self.x = torch.randn(steps, batch, inputs, dtype=dtype, requires_grad=True)
        self.hx = torch.randn(2, 1, batch, hidden, dtype=dtype).unbind()
        self.dy = torch.randn(steps, batch, hidden, dtype=dtype)

    def clear(self) -> None:
        """No gradients, so that the next backward need not add to them."""
        for leaf in (self.x, *self.ours.parameters(), *self.theirs.parameters()):
            leaf.grad = None

    def train(self, module: nn.Module) -> tuple[Tensor, Tensor, Tensor]:
        """Forward and backward: gradients of the input and of every parameter."""
        output, (h_n, c_n) = module(self.x, self.hx)
        output.backward(self.dy)
        return output, h_n, c_n

    @torch.no_grad()
    def infer(self, module: nn.Module) -> tuple[Tensor, Tensor, Tensor]:
        output, (h_n, c_n) = module(self.x, self.hx)
        return output, h_n, c_n

    def results(self, module: nn.Module) -> dict[str, Tensor | None]:
        """Everything ``train`` and ``infer`` compute."""
        names = ("output", "h_n", "c_n")
        self.clear()
        found: dict[str, Tensor | None] = dict(zip(names, self.train(module.train()), strict=True))
        leaves = (("input", self.x), *module.named_parameters())
        found |= {f"gradient of {name}": leaf.grad for name, leaf in leaves}
        inferred = self.infer(module.eval())
        return found | {f"{k} of inference": v for k, v in zip(names, inferred, strict=True)}

    def problem(self) -> str | None:
        """How our results differ from nn.LSTM's, or None."""
        ours, theirs = self.results(self.ours), self.results(self.theirs)
        differences = (difference(ours[name], theirs[name]) for name in theirs)
        found = zip(theirs, differences, strict=True)
        return next((f"{name} {text}" for name, text in found if text), None)

    def time(self, mode: str, seconds: float) -> Row:
        """The measured part of a row."""
        for module in (self.ours, self.theirs):
            module.train(mode == "train")  # nn.LSTM keeps what a backward needs when training
        step = self.train if mode == "train" else self.infer
        calls = partial(step, self.ours), partial(step, self.theirs)
        timed = paired(*calls, self.clear, seconds, self.clock)
        quartiles = {name: getattr(timed, name)._asdict() for name in ("ours", "theirs", "ratio")}
        return {"pairs": timed.pairs, "calls": timed.calls} | quartiles


def difference(
    ours: Tensor | None, theirs: Tensor | None, allowed: dict[str, float] | None = None
) -> str | None:
    """How two results differ beyond what is allowed, the tolerance of their dtype; or None."""
    if ours is None or theirs is None:
        return "is missing"
    if ours.shape != theirs.shape or ours.dtype != theirs.dtype:
        return "has another shape or dtype"
    # Sums over many rows grow; compare them on their own scale, as the tests do.
    scale = max(1.0, float(theirs.detach().abs().max()))
    a, b = ours.detach().double() / scale, theirs.detach().double() / scale
    if torch.allclose(a, b, **(allowed or tolerance(theirs.dtype))):
        return None
    return f"differs by up to {float((a - b).abs().max()) * scale:.2g}"


def flops(shape: Shape, mode: str) -> int:
    """Of the matrix products: a backward has twice its forward's."""
    steps, batch, inputs, hidden = shape
    forward = 8 * hidden * (inputs + hidden) * steps * batch
    return forward * (3 if mode == "train" else 1)


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
        row |= contest.time(mode, args.seconds)
        work = flops(shape, mode) / 1e9
        yield row | {"gflops": {who: work / row[who]["median"] for who in ("ours", "theirs")}}


def progress(todo: list[tuple[int, Shape]]) -> Iterable[tuple[int, Shape]]:
    return todo if tqdm is None else tqdm(todo, desc="timing", unit="shape")


def cpu_model() -> str:
    """As the processor calls itself."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        text = ""
    found = re.search(r"^model name\s*: (.+)$", text, re.MULTILINE)
    return found[1].strip() if found else platform.processor() or platform.machine()


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
            "available": torch.ops.fastlstm_C.cpu_instruction_sets().split(),
            "torch": torch.backends.cpu.get_cpu_capability(),
        },
        "environment": {name: os.environ[name] for name in VARIABLES if name in os.environ},
        "dtype": args.dtype,
        "seconds": args.seconds,
    }


def shape_of(text: str) -> Shape:
    """``T,B,I,H``: four positive integers."""
    parts = text.split(",")
    if len(parts) != 4 or not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise argparse.ArgumentTypeError(f"got {text!r}, expected T,B,I,H, such as 100,32,64,128")
    steps, batch, inputs, hidden = map(int, parts)
    return steps, batch, inputs, hidden


def seconds_of(text: str) -> float:
    """A positive number."""
    with contextlib.suppress(ValueError):
        if 0 < (value := float(text)) < math.inf:
            return value
    raise argparse.ArgumentTypeError(f"got {text!r}, expected a positive number")


def threads_of(text: str) -> int:
    """No more than there are CPUs: oversubscribed threads spin for each other."""
    if text.isdecimal() and 1 <= int(text) <= cpu_count():
        return int(text)
    raise argparse.ArgumentTypeError(f"got {text!r}, expected 1 to {cpu_count()}, the CPUs at hand")


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
    names = torch.ops.fastlstm_C.cpu_instruction_sets().split()
    args.instruction_set = args.instruction_set or names[0]
    if args.instruction_set not in names:
        parser.error(
            f"--instruction-set: got {args.instruction_set!r}, expected one of {', '.join(names)}"
        )
    try:
        args.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"--out: {error.strerror}")
    torch.ops.fastlstm_C.cpu_use_instruction_set(args.instruction_set)
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

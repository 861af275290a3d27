"""Did a change make fastlstm faster?  Times two versions of it in turn, without any rival:

python benches/versions.py OLD [NEW] --shapes 128,16,256,256 --modes train --threads 1 2

OLD and NEW are commits, or . for the working tree, which is NEW's default.  A commit is unpacked
and built below build/versions, once.  Each version runs in a process of its own, which sleeps while
the other is timed.  Both start anew for each of --rounds, since a process is faster or slower than
the next one by where its memory happens to lie.  A ratio is OLD's time over NEW's, above 1 where
NEW is faster: that of all rounds, and the least and the greatest of a round.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from itertools import product
from pathlib import Path
from time import sleep

sys.path.append(str(Path(__file__).resolve().parent.parent / "tests"))

import torch
from recording import ROOT
from variants import VARIANTS, CellContest, PenaltyContest, StepContest, VariantContest

from cases import SPEED
from fastlstm.cli.arguments import (
    DTYPES,
    Parser,
    Shape,
    cpu_count,
    seconds_of,
    shape_of,
    threads_of,
)
from fastlstm.cli.contest import MODES, Contest
from fastlstm.cli.table import aligned
from fastlstm.cli.timing import paired, seconds_per_call

CONTESTS: dict[str, Callable[..., Contest]] = {
    **{variant: partial(VariantContest, variant=variant) for variant in VARIANTS},
    "cell": CellContest,
    "penalty": PenaltyContest,
    "calls": StepContest,
}
COLUMNS = ("T,B,I,H", "what", "mode", "threads", "old / new (rounds)", "ms: old", "new")

Row = tuple[Shape, str, str, str, int]  # and variant, dtype, mode, threads

SPIN_SECONDS = 0.01  # OpenMP's threads look for more work for so long before they sleep
SHORT_SECONDS = 0.05  # of a call that feels whether its threads were asleep


class Version:
    """A process that times what it is told to, a number of calls at a time."""

    def __init__(self, tree: Path, row: Row) -> None:
        shape, *rest = row
        words = [",".join(map(str, shape)), *map(str, rest)]
        self.package = tree / "fastlstm"
        self.process = subprocess.Popen(
            [sys.executable, __file__, "--serve", *words],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONPATH": str(tree)},
        )

    def wait(self) -> None:
        """Until it is ready."""
        if Path(loaded := self.answer()) != self.package:
            raise SystemExit(f"loaded {loaded}, expected {self.package}")

    def seconds(self, calls: int) -> float:
        """Per call."""
        assert self.process.stdin is not None
        print(calls, file=self.process.stdin, flush=True)
        return float(self.answer())

    def answer(self) -> str:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"{self.package} was not timed, see above")
        return line.strip()

    def end(self) -> None:
        self.process.communicate()


def serve(words: list[str]) -> int:
    """What a version's process does: a number of calls comes in, the seconds of one go out."""
    import fastlstm

    shape, variant, dtype, mode, threads = words
    torch.set_num_threads(int(threads))
    contest = CONTESTS[variant](shape_of(shape), getattr(torch, dtype))
    if problem := contest.problem():
        print(f"{fastlstm.__file__}: {problem}", file=sys.stderr)
        return 1
    module = contest.ours.train(mode == "train")
    step = contest.train if mode == "train" else contest.infer
    print(Path(fastlstm.__file__).parent, flush=True)
    time, last = partial(seconds_per_call, partial(step, module), contest.clear), 0.0
    for line in sys.stdin:
        if int(threads) > 1 and last < SHORT_SECONDS:
            sleep(SPIN_SECONDS)  # the other version's threads
            time(1)  # wakes our own
        print(last := time(int(line)), flush=True)
    return 0


def tree(version: str, parser: argparse.ArgumentParser) -> Path:
    """Where a version lies, built."""
    folder = ROOT
    if version != ".":
        found = subprocess.run(
            ["git", "rev-parse", "--short=12", "--verify", f"{version}^{{commit}}"],
            cwd=ROOT,
            capture_output=True,
            text=True,
        )
        if found.returncode:
            parser.error(f"{version}: not a commit")
        folder = ROOT / "build" / "versions" / found.stdout.strip()
        folder.mkdir(parents=True, exist_ok=True)
        archive = subprocess.check_output(["git", "archive", version], cwd=ROOT)
        subprocess.run(["tar", "x", "-C", str(folder)], input=archive, check=True)
    build = [sys.executable, "-P", "fastlstm/build.py"]  # which prints the library's path
    subprocess.run(build, cwd=folder, check=True, stdout=subprocess.DEVNULL)
    return folder


def measured(trees: tuple[Path, Path], row: Row, rounds: int, seconds: float) -> list[str]:
    """A line of the table."""
    found = []
    for _ in range(rounds):
        old, new = versions = [Version(tree, row) for tree in trees]
        try:
            for version in versions:
                version.wait()
            clock = lambda version, before, calls: version.seconds(calls)  # noqa: E731
            found.append(paired(new, old, lambda: None, seconds / rounds, clock))
        finally:
            for version in versions:
                version.end()
    ratios = [each.ratio.median for each in found]
    shape, variant, dtype, mode, threads = row
    times = [statistics.median(getattr(p, who).median for p in found) for who in ("theirs", "ours")]
    return [
        ",".join(map(str, shape)),
        variant if dtype == "float32" else f"{variant} {dtype}",
        MODES[mode],
        str(threads),
        f"{statistics.median(ratios):.3f} ({min(ratios):.3f}-{max(ratios):.3f})",
        *(f"{time * 1e3:.3g}" for time in times),
    ]


def main(words: list[str] | None = None) -> int:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add, threads = parser.add_argument, sorted({1, min(2, cpu_count())})
    add("old", metavar="OLD")
    add("new", nargs="?", default=".", metavar="NEW")
    add("--shapes", nargs="+", type=shape_of, default=SPEED, metavar="T,B,I,H")
    add(
        "--variants",
        nargs="+",
        choices=CONTESTS,
        default=["plain"],
        metavar="WHAT",
        help=", ".join(CONTESTS),
    )
    add("--dtypes", nargs="+", choices=DTYPES, default=["float32"], metavar="DTYPE")
    add("--modes", nargs="+", choices=tuple(MODES), default=tuple(MODES))
    add("--threads", nargs="+", type=threads_of, default=threads, metavar="N")
    add("--rounds", type=int, default=3, metavar="N", help="default 3")
    add("--seconds", type=seconds_of, default=3.0, help="of a row, at least (default 3)")
    args = parser.parse_args(words)
    if args.rounds < 1:
        parser.error(f"--rounds: got {args.rounds}, expected 1 or more")
    trees = tree(args.old, parser), tree(args.new, parser)
    lines = []
    for row in product(args.shapes, args.variants, args.dtypes, args.modes, args.threads):
        lines.append(measured(trees, row, args.rounds, args.seconds))
        print("  ".join(lines[-1]), file=sys.stderr)
    print("\n".join(aligned(lines, COLUMNS)))
    return 0


if __name__ == "__main__":
    sys.exit(serve(sys.argv[2:]) if sys.argv[1:2] == ["--serve"] else main())

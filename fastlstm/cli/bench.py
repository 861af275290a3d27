"""Time fastlstm.LSTM against torch.nn.LSTM on this machine.

Same weights, same inputs, in turn in one process; the ratio is the median over the pairs, and
above 1 fastlstm is faster.  A shape whose results differ from nn.LSTM's is not timed, and the
exit status is 1.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

from .arguments import DTYPES, Shape, backend_of, device_of, seconds_of, shape_of, threads_of
from .contest import MODES, Contest, Row
from .info import describe
from .table import MEASURED, aligned, means, measured

# From one short sequence, where calls cost most, to what fills the caches.
SHAPES: tuple[Shape, ...] = (
    (100, 1, 64, 128),
    (100, 32, 64, 128),
    (128, 16, 256, 256),
    (100, 64, 512, 512),
)
COLUMNS = ("T,B,I,H", "mode", *MEASURED)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What ``python -m fastlstm bench`` takes."""
    add = parser.add_argument
    add("--shape", nargs="+", action="extend", type=shape_of, metavar="T,B,I,H")
    add("--dtype", choices=DTYPES, default="float32")
    add("--device", type=device_of, default=torch.device("cpu"), help="cpu (default), cuda:0, ...")
    add("--backend", type=backend_of, default="auto")
    add("--train", action="append_const", dest="modes", const="train", help="only training")
    add("--infer", action="append_const", dest="modes", const="infer", help="only inference")
    add("--threads", type=threads_of, metavar="N", help="torch's (default: as it chooses)")
    add("--seconds", type=seconds_of, default=1.0, help="for each row, at least (default 1)")
    add("--json", type=Path, metavar="FILE", help="write figures and machine there")
    add("--plot", type=Path, metavar="FILE", help="write a bar for each row there: .png, .svg, ...")


def run(args: argparse.Namespace) -> int:
    """The exit status; the table is printed."""
    refuse = args.parser.error
    pyplot = _pyplot(args) if args.plot else None
    for option, path in (("--json", args.json), ("--plot", args.plot)):
        if path is not None:
            try:
                path.open("ab").close()  # known now, not after minutes of measuring
            except OSError as error:
                refuse(f"{option}: {path}: {error.strerror}")
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    rows = [row for shape in _progress(args.shape or SHAPES) for row in _measure(args, shape)]
    print("\n".join(_text(args, rows)))
    if args.json is not None:
        result = describe() | {"dtype": args.dtype, "device": str(args.device), "rows": rows}
        args.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    if pyplot is not None:
        _plot(pyplot, args.plot, rows)
    return int(any("error" in row for row in rows))


def _measure(args: argparse.Namespace, shape: Shape) -> Iterator[Row]:
    """A row for each mode."""
    modes = [mode for mode in MODES if mode in (args.modes or MODES)]
    lead = {"shape": shape, "threads": torch.get_num_threads(), "backend": args.backend}
    try:
        contest = Contest(shape, getattr(torch, args.dtype), args.device, args.backend)
        problem = contest.problem()
    except RuntimeError as error:  # a backend that refuses, torch that cannot, no memory
        problem = str(error).strip().partition("\n")[0]
    for mode in modes:
        row = lead | {"mode": mode}
        yield row | ({"error": problem} if problem else contest.row(shape, mode, args.seconds))


def _progress(shapes: Iterable[Shape]) -> Iterable[Shape]:
    try:
        from tqdm import tqdm
    except ImportError:  # a bar is a comfort only
        return shapes
    return tqdm(shapes, desc="timing", unit="shape", leave=False)


def _text(args: argparse.Namespace, rows: list[Row]) -> list[str]:
    """The table, and below it the mean of each mode."""
    versions = describe()["versions"]
    head = (
        f"fastlstm {versions['fastlstm']}, torch {versions['torch']}: {args.dtype} on"
        f" {args.device}, backend {args.backend}, {torch.get_num_threads()} threads"
    )
    lines = [[",".join(map(str, row["shape"])), MODES[row["mode"]], *measured(row)] for row in rows]
    text = [head, *aligned(lines, COLUMNS)]
    for mode in dict.fromkeys(row["mode"] for row in rows):
        mean, least, count = means([row for row in rows if row["mode"] == mode])
        if mean:
            text.append(f"{MODES[mode]}: geometric mean {mean}, minimum {least}, {count} timed")
    return text


def _pyplot(args: argparse.Namespace) -> Any:
    """matplotlib, known to be there and to know the file's format."""
    try:
        import matplotlib
    except ImportError:
        args.parser.error("--plot: needs matplotlib: pip install matplotlib")
    matplotlib.use("Agg")
    from matplotlib import pyplot

    formats = sorted(pyplot.gcf().canvas.get_supported_filetypes())
    pyplot.close()
    if args.plot.suffix.removeprefix(".").lower() not in formats:
        args.parser.error(f"--plot: {args.plot}: expected a name that ends in {', '.join(formats)}")
    return pyplot


def _plot(pyplot: Any, path: Path, rows: list[Row]) -> None:
    """The ratio of each row that was timed, with its quartiles."""
    timed = [row for row in rows if "error" not in row][::-1]
    labels = [f"{','.join(map(str, row['shape']))} {MODES[row['mode']]}" for row in timed]
    ratios = [row["ratio"]["median"] for row in timed]
    whiskers = [
        [abs(row["ratio"][end] - row["ratio"]["median"]) for row in timed] for end in ("q1", "q3")
    ]
    figure, axis = pyplot.subplots(figsize=(8, 1.5 + 0.3 * len(timed)), layout="constrained")
    axis.barh(labels, ratios, xerr=whiskers, color=["C0" if r >= 1 else "C3" for r in ratios])
    axis.axvline(1.0, color="black", linewidth=1)
    axis.set(xlabel="time of nn.LSTM / time of fastlstm", title="above 1, fastlstm is faster")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)

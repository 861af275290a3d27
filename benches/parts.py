"""What ``make bench`` measures, part by part: each a list of jobs, and each job gives rows.

A row names what was timed (part, shape, variant, dtype, mode, threads, rival), and has its times
and the work of a call, or the error that kept it from being timed.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any, NamedTuple

import memory
import torch
from floors import Work, cell_work, lstm_work, penalty_work
from model import ModelContest
from ourselves import HalfContest, ThreadsContest
from peers import PEERS, PeerContest, present
from sweep import random_shapes
from variants import CellContest, PenaltyContest, StepContest, VariantContest, config

from cases import MODEL, SPEED
from fastlstm.cli.arguments import Shape
from fastlstm.cli.contest import Contest, Row

FEATURE = (100, 16, 128, 256)  # what variants are timed at
STREAMING = (1, 1, 128, 128)
DECODER = (20, 16, 512, 512)
STEPS = (1, 4, 16, 64, 256)  # what a scaling row has instead of T, B, or both I and H
BATCHES = (1, 4, 16, 64, 256)
WIDTHS = (32, 50, 64, 100, 128, 200, 256, 512, 1024)  # not all of whole vectors
BASE = (64, 16, 256, 256)
BUSY = tuple(shape for shape in SPEED if shape[3] >= 256 and shape[1] >= 16)  # threads' own aim


Make = Callable[[], Any]  # a contest
Count = Callable[[str], Work]  # the work of a call in a mode


class Job(NamedTuple):
    """Rows that are measured on so many threads."""

    threads: int
    rows: Callable[[], Iterable[Row]]


def row_of(part: str, shape: Shape, mode: str, threads: int, **more: str) -> Row:
    """What names a row; a row is of the plain float32 layer against nn.LSTM if nothing else."""
    usual = {"variant": "plain", "dtype": "float32", "rival": "nn.LSTM"}
    return {"part": part, "shape": list(shape), "mode": mode, "threads": threads} | usual | more


def measured(rows: Iterable[Row], contest: Make, work: Count, seconds: float) -> Iterator[Row]:
    """Rows of one contest, which is made and checked once; a rival that refuses is an error too."""
    try:
        made = contest()
        problem = made.problem()
    except (RuntimeError, NotImplementedError) as error:
        problem = f"{type(error).__name__}: {error}".partition("\n")[0][:200]
    for row in rows:
        if problem is not None:
            yield row | {"error": problem}
            continue
        row |= made.time(row["mode"], seconds) | {"work": work(row["mode"])._asdict()}
        rate = work(row["mode"]).flops() / 1e9
        yield row | {"gflops": {who: rate / row[who]["median"] for who in ("ours", "theirs")}}


def plain_work(shape: Shape, dtype: str, mode: str) -> Work:
    steps, batch, inputs, hidden = shape
    return lstm_work(steps * batch, steps, inputs, hidden, mode, dtype=dtype)


def plain(part: str, shapes: Iterable[Shape], args: argparse.Namespace) -> Iterator[Job]:
    """The layer as it is, in args.dtype."""
    for threads in args.threads:
        for shape in shapes:
            rows = [row_of(part, shape, mode, threads, dtype=args.dtype) for mode in args.modes]
            contest = partial(Contest, shape, getattr(torch, args.dtype))
            work = partial(plain_work, shape, args.dtype)
            yield Job(threads, partial(measured, rows, contest, work, args.seconds))


def speed(args: argparse.Namespace) -> Iterator[Job]:
    return plain("speed", args.shapes, args)


def random(args: argparse.Namespace) -> Iterator[Job]:
    return plain("random", random_shapes(args.random, args.seed), args)


def scaling(args: argparse.Namespace) -> Iterator[Job]:
    """One thread; T, B and H = I, one after the other."""
    steps, batch, _, width = BASE
    shapes = [(t, batch, width, width) for t in STEPS]
    shapes += [(steps, b, width, width) for b in BATCHES]
    shapes += [(steps, batch, h, h) for h in WIDTHS]
    once = argparse.Namespace(**{**vars(args), "threads": [1], "dtype": "float32"})
    return plain("scaling", dict.fromkeys(shapes), once)


def features(args: argparse.Namespace) -> Iterator[Job]:
    """What else the module does, and half precision against our own float32."""

    def job(
        count: int,
        contest: Make,
        work: Count,
        shape: Shape = FEATURE,
        only: str | None = None,
        **names: str,
    ) -> Job:
        modes = [mode for mode in args.modes if only in (mode, None)]
        rows = [row_of("features", shape, mode, count, **names) for mode in modes]
        return Job(count, partial(measured, rows, contest, work, args.seconds))

    single = torch.float32
    for count in args.threads:
        for variant in ("packed", "lengths", "projection", "two layers, both directions", "resets"):
            rival = "fastlstm without resets" if variant == "resets" else "nn.LSTM"
            contest = partial(VariantContest, FEATURE, single, variant)
            work = partial(variant_work, variant)
            yield job(count, contest, work, variant=variant, rival=rival)
        for dtype in ("bfloat16", "float16", "float64"):
            contest = partial(Contest, FEATURE, getattr(torch, dtype))
            yield job(count, contest, partial(plain_work, FEATURE, dtype), dtype=dtype)
        for dtype in ("bfloat16", "float16"):
            contest = partial(HalfContest, FEATURE, getattr(torch, dtype))
            work = partial(plain_work, FEATURE, dtype)
            yield job(count, contest, work, dtype=dtype, rival="fastlstm in float32")
        contest, work = partial(PenaltyContest, FEATURE, single), partial(penalty_work, *FEATURE)
        yield job(count, contest, work, only="train", variant="penalty")
        contest, work = partial(CellContest, FEATURE, single), partial(cell_work, *FEATURE)
        yield job(count, contest, work, variant="cell", rival="nn.LSTMCell")
        contest, work = partial(StepContest, DECODER, single), partial(cell_work, *DECODER)
        yield job(count, contest, work, DECODER, variant="calls")
        contest, work = (
            partial(Contest, STREAMING, single),
            partial(plain_work, STREAMING, "float32"),
        )
        yield job(count, contest, work, STREAMING, "infer", variant="one step")


def variant_work(variant: str, mode: str) -> Work:
    """Of FEATURE; rows are counted, not estimated."""
    steps, _, inputs, hidden = FEATURE
    options = config(variant, hidden)
    rows = VariantContest(FEATURE, torch.float32, variant).rows()
    sizes = dict(projection=options["proj_size"], layers=options["num_layers"])
    return lstm_work(
        rows, steps, inputs, hidden, mode, directions=1 + options["bidirectional"], **sizes
    )


def threads(args: argparse.Namespace) -> Iterator[Job]:
    """What several threads give."""
    for count in (n for n in args.threads if n > 1):
        for shape in BUSY:
            rows = [
                row_of("threads", shape, mode, count, rival="fastlstm on 1 thread")
                for mode in args.modes
            ]
            contest = partial(ThreadsContest, shape, count)
            work = partial(plain_work, shape, "float32")
            yield Job(count, partial(measured, rows, contest, work, args.seconds))


def model(args: argparse.Namespace) -> Iterator[Job]:
    """The character model; its work is that of its LSTM alone, and not recorded."""

    def rows(count: int) -> Iterator[Row]:
        row = row_of("model", MODEL, "train", count, variant="character model")
        contest = ModelContest(MODEL)
        problem = contest.problem()
        yield row | ({"error": problem} if problem else contest.time(args.seconds))

    return (Job(count, partial(rows, count)) for count in args.threads if "train" in args.modes)


def peers(args: argparse.Namespace) -> Iterator[Job]:
    """Whoever is installed and runs on a CPU."""
    for count in args.threads:
        for peer in filter(present, PEERS):
            short = [(peer.most_steps, *shape[1:]) for shape in SPEED[1:2] if peer.most_steps]
            for shape in short or SPEED:
                modes = [mode for mode in args.modes if mode in peer.modes]
                rows = [row_of("peers", shape, mode, count, rival=peer.name) for mode in modes]
                contest = partial(PeerContest, shape, peer, count)
                work = partial(plain_work, shape, "float32")
                yield Job(count, partial(measured, rows, contest, work, args.seconds))


def peak_memory(args: argparse.Namespace) -> Iterator[Job]:
    """Bytes beyond inputs, outputs and gradients."""

    def rows(shape: Shape) -> Iterator[Row]:
        for row in memory.rows([shape]):
            if row["mode"] in args.modes:
                yield row_of("memory", shape, row["mode"], 1) | {"peak_bytes": row["peak_bytes"]}

    return (Job(1, partial(rows, shape)) for shape in SPEED)


PARTS: dict[str, Callable[[argparse.Namespace], Iterator[Job]]] = {
    **{f.__name__: f for f in (speed, features, threads, scaling, model, peers)},
    "memory": peak_memory,
    "random": random,
}

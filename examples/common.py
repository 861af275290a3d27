"""What the examples share: options, errors in one line, where files go, several processes."""

from __future__ import annotations

import contextlib
import gc
import os
import sys
from argparse import ArgumentParser, ArgumentTypeError, Namespace
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NoReturn

import torch
from torch import Tensor
from torch import distributed as dist

if dist.is_available():
    import torch.distributed.nn  # before there is a group: its functions keep theirs for ever


class UserError(Exception):
    """Something the user can put right; shown as one line, with exit status 2."""


# %% The command line
class Parser(ArgumentParser):
    """An ArgumentParser whose errors are one line, without the usage."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {' '.join(message.split())}\n")


def number(kind: type, low: float, high: float) -> Callable[[str], float]:
    """An argparse type: a number within bounds (which no NaN is)."""

    def parse(text: str) -> float:
        value = kind(text)
        if not low <= value <= high:
            raise ArgumentTypeError(f"must be from {low} to {high}, got {text}")
        return value

    parse.__name__ = kind.__name__  # argparse says "invalid int value"
    return parse


def add_common_options(parser: Parser, out: str, threads: int | None = None) -> None:
    """``--threads``, ``--seed`` and ``--out``, which every example has."""
    add = parser.add_argument
    default = threads or "torch's choice"
    cores = number(int, 1, os.cpu_count() or 1)
    add("--threads", type=cores, default=threads, help=f"default {default}")
    add("--seed", type=number(int, 0, 2**32), default=0, help="default 0")
    add("--out", type=Path, default=Path(out), help=f"where files go (default {out})")


def start(args: Namespace) -> None:
    """Threads and seed, as the options say."""
    torch.set_num_threads(args.threads or torch.get_num_threads())
    torch.manual_seed(args.seed)


def run_example(run: Callable[[Namespace], None], parser: Parser, argv: list[str] | None) -> None:
    """Run; what the user can put right ends in one line and exit status 2.

    A notebook's kernel has a command line of its own: there the defaults are taken.
    """
    if argv is None and "ipykernel" in sys.modules:
        argv = []
    args = parser.parse_args(argv)
    try:
        run(args)
    except (UserError, OSError) as error:
        if int(os.environ.get("RANK", "0")) > 0:  # of torchrun's processes the first says it
            parser.exit(2)
        parser.error(str(error))


def prepare(*paths: Path) -> None:
    """Make the directories now, so that no training is lost for want of a place to write to."""
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            raise UserError(f"{path} is a directory")


# %% Several processes, each with its share of every batch
def rank() -> int:
    """This process's number, 0 for the first and for the only one."""
    return dist.get_rank() if dist.is_initialized() else 0


def processes() -> int:
    """How many there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


@contextlib.contextmanager
def process_group(wanted: bool) -> Iterator[torch.device]:
    """Join the processes that ``torchrun`` started, and yield the device of this one.

    GPUs talk through nccl, CPUs through gloo.  Only the first process prints.
    """
    if not wanted:
        yield torch.device("cpu")
        return
    if "LOCAL_RANK" not in os.environ:
        raise UserError("--ddp: start it with torchrun --nproc-per-node 2 SCRIPT --ddp")
    gpu = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if gpu else torch.device("cpu")
    if gpu:
        if device.index >= torch.cuda.device_count():
            found = torch.cuda.device_count()
            raise UserError(f"--ddp: process {device.index} of this node has no GPU, of {found}")
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if gpu else "gloo")
    try:
        with open(os.devnull, "w") as null, contextlib.ExitStack() as silence:
            if rank() > 0:
                silence.enter_context(contextlib.redirect_stdout(null))
            yield device
    finally:
        # The group waits for its threads when its last user is gone, and a model may be part of a
        # cycle. A thread that outlives Python and still holds a tensor aborts the process.
        gc.collect()
        dist.destroy_process_group()


def mean_of_processes(value: Tensor) -> Tensor:
    """The mean of every process's ``value``."""
    if processes() > 1:
        value = value.detach().clone()
        dist.all_reduce(value)
        value /= processes()
    return value


def join_columns(part: Tensor) -> Tensor:
    """Every process's columns (L, B/processes, H) side by side: (L, B, H)."""
    if processes() == 1:
        return part
    parts = [torch.empty_like(part) for _ in range(processes())]
    dist.all_gather(parts, part.contiguous())
    return torch.cat(parts, 1)


def own_columns(whole: Tensor) -> Tensor:
    """This process's share of the columns, the second dimension."""
    return whole.chunk(processes(), 1)[rank()]

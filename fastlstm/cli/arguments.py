"""Arguments of the command line and of benches/: bad ones end in one line and status 2."""

from __future__ import annotations

import argparse
import contextlib
import math
import os
from typing import NoReturn

import torch

from .. import backends

DTYPES = ("float32", "float64", "float16", "bfloat16")

Shape = tuple[int, int, int, int]  # T, B, I, H


class Parser(argparse.ArgumentParser):
    """One line says what is wrong; --help says the rest."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n")


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


def cpu_count() -> int:
    """The CPUs this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def threads_of(text: str) -> int:
    """No more than there are CPUs: oversubscribed threads spin for each other."""
    if text.isdecimal() and 1 <= int(text) <= cpu_count():
        return int(text)
    raise argparse.ArgumentTypeError(f"got {text!r}, expected 1 to {cpu_count()}, the CPUs at hand")


def device_of(text: str) -> torch.device:
    """A device that is there."""
    try:
        device = torch.device(text)
        torch.empty(0, device=device)
    except Exception as error:  # RuntimeError, AssertionError, NotImplementedError: torch's choice
        first = str(error).strip().partition("\n")[0]
        raise argparse.ArgumentTypeError(f"got {text!r}: {first}") from error
    if device.type == "meta":
        raise argparse.ArgumentTypeError("got 'meta', expected a device that computes")
    return device


def backend_of(text: str) -> str:
    """A backend that is there, or "auto"."""
    try:
        backends.check_name(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error).partition(": ")[2]) from error
    missing = None if text == "auto" else backends.available_backends()[text]
    if missing is not None:
        raise argparse.ArgumentTypeError(f"{text} is not there: {missing}")
    return text

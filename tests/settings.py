"""What tests change in the process for a while, and put back."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def threads(count: int) -> Iterator[None]:
    """torch, and the library with it, on so many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def instructions(name: str) -> Iterator[None]:
    """The library on one instruction set, of ``native.instruction_sets()``."""
    before = torch.ops.fastlstm_C.cpu_use_instruction_set(name)
    try:
        yield
    finally:
        torch.ops.fastlstm_C.cpu_use_instruction_set(before)

"""What tests change in the process for a while, and put back."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from fastlstm.cli.check import threads as threads


@contextmanager
def instructions(name: str) -> Iterator[None]:
    """The library on one instruction set, of ``native.instruction_sets()``."""
    before = torch.ops.fastlstm_C.cpu_use_instruction_set(name)
    try:
        yield
    finally:
        torch.ops.fastlstm_C.cpu_use_instruction_set(before)

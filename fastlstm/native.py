"""Loads the compiled library (csrc/) once, and says why where it cannot."""

from __future__ import annotations

import functools

import torch

from . import build


@functools.cache
def missing() -> str | None:
    """Load the library; None once it is loaded, else the reason why it is not."""
    try:
        torch.ops.load_library(build.library_path())
    except (build.BuildError, OSError) as error:
        return str(error)
    return None

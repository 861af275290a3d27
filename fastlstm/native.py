"""Loads the compiled library (csrc/) once, and says why where it cannot."""

from __future__ import annotations

import functools
import warnings

import torch

from . import build


@functools.cache
def missing() -> str | None:
    """Load the library; None once it is loaded, else the reason why it is not."""
    try:
        torch.ops.load_library(build.library_path())
    except (build.BuildError, OSError) as error:
        # Said aloud once: backend="auto" goes on without it, and slower.
        warnings.warn(f"fastlstm runs without its C++ kernels: {error}", stacklevel=2)
        return str(error)
    return None

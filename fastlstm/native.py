"""Loads the compiled libraries (csrc/) once, and says why where it cannot."""

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


@functools.cache
def instruction_sets() -> tuple[str, ...]:
    """What the library may use on this processor, the best first; none without the library."""
    return () if missing() else tuple(str(torch.ops.fastlstm_C.cpu_instruction_sets()).split())


@functools.cache
def multiplies_bfloat16() -> bool:
    """Has this library instructions for it here?  Then torch's own kernels have them too."""
    return not {"amx", "avx512_bf16"}.isdisjoint(instruction_sets())


@functools.cache
def has_matrix_unit() -> bool:
    """May this library use one here?  Then torch's own kernels do too."""
    return "amx" in instruction_sets()


def use_instruction_set(name: str) -> str:
    """Let the CPU's kernels use this one of ``instruction_sets()``; returns the one before."""
    return str(torch.ops.fastlstm_C.cpu_use_instruction_set(name))


def spare_matrix_unit(on: bool) -> None:
    """Whether "amx" leaves small passes to vectors, and "avx512_bf16" a few steps unpacked, as they
    should but for tests of them.
    """
    torch.ops.fastlstm_C.cpu_spare_matrix_unit(on)


def assume_processor(maker: str, l2_cache_bytes: int) -> tuple[str, int]:
    """Let the CPU's kernels choose as on a processor of this maker ("intel", "amd", "other") with
    so many bytes of L2 cache; returns those before.  For tests, and not while a call runs.
    """
    before_maker, before_bytes = torch.ops.fastlstm_C.cpu_assume_processor(maker, l2_cache_bytes)
    return str(before_maker), int(before_bytes)


@functools.cache
def missing_cuda() -> str | None:
    """Load the CUDA library; None once it is loaded, else the reason why it is not."""
    try:
        torch.ops.load_library(build.cuda_library_path())
    except (build.BuildError, OSError) as error:
        return str(error)  # few have it, so nobody is warned
    return None

"""Builds the cuda backend's library with an emulator in the GPU's place, for the tests."""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Iterator
from pathlib import Path

import torch

from fastlstm import build, cuda, native

HERE = Path(__file__).resolve().parent
# Optimised: the emulator does a GPU's work. No warnings of pragmas that are for nvcc.
FLAGS = ("-DFASTLSTM_EMULATED", f"-I{HERE / 'emulator'}", "-Wno-unknown-pragmas")

# tests/emulator/emulator.h: Ordering, from 1 on.
ORDERINGS = (
    *("the_wait", "the_acquire", "the_release"),
    *("the_barrier_of_sums", "the_barrier_of_stores", "the_warps_barrier", "the_barrier_of_zeros"),
    *("the_bytes", "the_arrival", "the_fence_of_mbarriers"),
    *("the_first_meeting", "the_last_meeting", "the_outlasting"),
)
# Those that a kernel of each kind has. Who sends into another block's mailbox releases nothing, and
# what a lane of a cluster has waited for is all that it reads.
OF_A_GRID = ORDERINGS[:6]
OF_A_CLUSTER = tuple(name for name in ORDERINGS if name not in ("the_release", "the_warps_barrier"))
DEFAULTS = {"seed": 0, "detect": 0, "omit": 0, "blocks": 1 << 20, "clusters": 1 << 20, "slow": 1}
SOURCES = ("emulator", "cluster", "values", "grid_instances", "cluster_instances")


@functools.cache
def library() -> Path:
    """The library, made by ninja in ``build/emulator`` of the checkout; some twenty seconds."""
    tools, root = build.find_toolchain(), build.sources_dir()
    folder = HERE.parent / "build" / "emulator"
    folder.mkdir(parents=True, exist_ok=True)
    common = (*build._common_flags(tools), *FLAGS)
    steps = [
        build.Step("bindings.o", root / "cuda/bindings.cpp", (*common, *build._torch_flags(tools))),
        build.Step("dispatch.o", root / "cuda/dispatch.cpp", common),
    ]
    for name in SOURCES:
        source = HERE / "emulator" / f"{name}.cpp"
        steps.append(build.Step(f"{name}.o", source, (*common, "-O1")))
    link = [f"-L{tools.torch_dir / 'lib'}", *build.LINK_FLAGS]
    text = build._ninja_file(tools.compiler, steps, build.CUDA_LIBRARY, link)
    with build._locked(folder / "lock"):
        build._write_if_new(folder / "build.ninja", text)
        build._run_ninja(folder, tools.ninja, build.CUDA_LIBRARY)
    return folder / build.CUDA_LIBRARY


@contextlib.contextmanager
def emulator() -> Iterator[None]:
    """The backend runs on CPU tensors, with floats multiplied in TF32."""
    before = os.environ.get("FASTLSTM_CUDA_LIBRARY")
    os.environ["FASTLSTM_CUDA_LIBRARY"] = str(library())
    clear()
    assert native.missing_cuda() is None, native.missing_cuda()
    try:
        yield
    finally:
        del os.environ["FASTLSTM_CUDA_LIBRARY"]
        if before is not None:
            os.environ["FASTLSTM_CUDA_LIBRARY"] = before
        clear()


def clear() -> None:
    """Forget whether there is a library and what it runs on."""
    native.missing_cuda.cache_clear()
    cuda._device_type.cache_clear()


def setting(name: str, value: int) -> None:
    """Of the emulator; see emulator.h."""
    torch.ops.fastlstm_cuda.emulator_set(name, value)


def omit(ordering: str) -> None:
    """Leave one of ORDERINGS out of the protocol."""
    setting("omit", 1 + ORDERINGS.index(ordering))


def reset() -> None:
    for name, value in DEFAULTS.items():
        setting(name, value)

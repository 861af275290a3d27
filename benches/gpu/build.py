"""A step of ``make gpu``: build the CPU's library in place, and the CUDA library for this GPU.

Both at once, or neither where libraries of these sources came with the checkout. The triton backend
needs neither, so missing tools are only reported; a build that starts and fails is an error.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from types import ModuleType

from recording import ROOT, SKIPPED, arguments


def load_build() -> ModuleType:
    """fastlstm/build.py by its path: the package may not be importable without its library."""
    path = ROOT / "fastlstm" / "build.py"
    spec = importlib.util.spec_from_file_location("fastlstm_build", path)
    build = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = build
    spec.loader.exec_module(build)
    return build


def start_cpu(build: ModuleType) -> subprocess.Popen | int:
    """The process that builds it, or its exit status where there is none."""
    if "FASTLSTM_LIBRARY" in os.environ:
        print("no library for the CPU is built: FASTLSTM_LIBRARY names one")
        return SKIPPED
    if is_there(build, build.LIBRARY, build.sources_digest()):
        return 0
    try:
        build.find_toolchain()
    except build.MissingError as error:
        print(f"no library for the CPU: {error}")
        return SKIPPED
    words = [sys.executable, "-P", str(ROOT / "fastlstm" / "build.py")]
    return subprocess.Popen(words, cwd=ROOT)


def is_there(build: ModuleType, name: str, digest: str, architecture: str | None = None) -> bool:
    """Is there a library of these sources, for such a GPU too?"""
    library = build.PACKAGE / name
    info = build.build_info(library) if library.is_file() else {}
    there = info.get("sources") == digest
    if there and architecture is not None:
        there = architecture in info["architectures"]
    if not there:
        return False
    import torch  # which it is linked with

    try:
        torch.ops.load_library(library)
    except OSError as error:
        print(f"{library} is of these sources, but does not load here: {error}")
        return False
    print(f"{library} is of these sources")
    return True


def build_cuda(build: ModuleType) -> int:
    """The exit status; for the architecture of the GPU that is here alone."""
    import torch

    if "FASTLSTM_CUDA_LIBRARY" in os.environ:
        print("no CUDA library is built: FASTLSTM_CUDA_LIBRARY names one")
        return SKIPPED
    if not torch.cuda.is_available():
        print("no CUDA library: torch finds no CUDA device")
        return SKIPPED
    major, minor = torch.cuda.get_device_capability(0)
    name = f"{major}{minor}" + "a" * (major >= 9)
    if is_there(build, build.CUDA_LIBRARY, build.cuda_sources_digest(), name):
        return 0
    try:
        library = build.build_cuda(ROOT / "build" / "cuda-gpu", architectures=[name])
    except build.MissingError as error:
        print(f"no CUDA library: {error}")
        return SKIPPED
    except build.BuildError as error:
        print(f"no CUDA library: {error}")
        return 1
    print(build.copy_library(library, build.PACKAGE))
    return 0


def main() -> int:
    arguments(__doc__)
    build = load_build()
    cpu = start_cpu(build)
    statuses = [build_cuda(build), cpu if isinstance(cpu, int) else cpu.wait()]
    failed = [status for status in statuses if status not in (0, SKIPPED)]
    return failed[0] if failed else min(statuses)


if __name__ == "__main__":
    sys.exit(main())

"""A step of ``make gpu``: build the CPU's library in place, and the CUDA library for this GPU.

The triton backend needs neither, so missing tools are only reported; a build that starts and fails
is an error.
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


def build_cpu(build: ModuleType) -> int:
    """The exit status."""
    if "FASTLSTM_LIBRARY" in os.environ:
        print("no library for the CPU is built: FASTLSTM_LIBRARY names one")
        return SKIPPED
    try:
        build.find_toolchain()
    except build.MissingError as error:
        print(f"no library for the CPU: {error}")
        return SKIPPED
    words = [sys.executable, "-P", str(ROOT / "fastlstm" / "build.py")]
    return subprocess.run(words, cwd=ROOT).returncode


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
    statuses = [build_cpu(build), build_cuda(build)]
    failed = [status for status in statuses if status not in (0, SKIPPED)]
    return failed[0] if failed else min(statuses)


if __name__ == "__main__":
    sys.exit(main())

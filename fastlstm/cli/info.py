"""Say what there is on this machine: paste it into a bug report."""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import platform
import re
from pathlib import Path
from typing import Any

import torch

from .. import __version__, backends, build, native
from .arguments import cpu_count

# What changes the code that runs, or the threads it runs on.
VARIABLES = (
    *("FASTLSTM_LIBRARY", "FASTLSTM_CUDA_LIBRARY", "FASTLSTM_BUILD", "CXX", "CUDA_HOME"),
    *("XDG_CACHE_HOME", "TRITON_INTERPRET"),
    *("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA", "MKL_ENABLE_INSTRUCTIONS", "ATEN_CPU_CAPABILITY"),
    *("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OMP_PROC_BIND", "OMP_WAIT_POLICY"),
    *("GOMP_CPU_AFFINITY", "GOMP_SPINCOUNT", "CUDA_VISIBLE_DEVICES"),
)
PACKAGES = ("torch", "triton", "numpy", "ninja")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Nothing: it says everything."""


def run(args: argparse.Namespace) -> int:
    """Print it; it cannot fail."""
    found = describe()
    for section, content in found.items():
        print(f"{section}:")
        for name, value in content.items():
            shown = " ".join(value) if isinstance(value, list) else value
            print(f"  {name:<16} {shown}")
    return 0


def describe() -> dict[str, dict[str, Any]]:
    """Everything that what fastlstm does may depend on, by section."""
    return {
        "versions": _versions(),
        "machine": _machine(),
        "backends": {
            name: "available" if missing is None else f"not here: {missing}"
            for name, missing in backends.available_backends().items()
        },
        "library": _library(),
        "cuda library": _cuda_library(),
        "environment": {name: os.environ[name] for name in VARIABLES if name in os.environ},
    }


def _versions() -> dict[str, Any]:
    found: dict[str, Any] = {"fastlstm": __version__, "python": platform.python_version()}
    found |= {name: _version(name) for name in PACKAGES}
    # The metadata of a wheel may lack what its build is called: 2.13.0 for 2.13.0+cpu.
    found |= {"torch": str(torch.__version__), "cuda": torch.version.cuda or "not in this torch"}
    return found


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _machine() -> dict[str, Any]:
    devices = [torch.cuda.get_device_name(k) for k in range(torch.cuda.device_count())]
    return {
        "system": platform.platform(),
        "cpu": cpu_model(),
        "cpus": f"{cpu_count()} of {os.cpu_count()} usable, torch runs {torch.get_num_threads()}"
        f" threads with {torch.backends.cpu.get_cpu_capability()}",
        "gpus": ", ".join(devices) or "torch finds none",
    }


def cpu_model() -> str:
    """As the processor calls itself."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        text = ""
    found = re.search(r"^model name\s*: (.+)$", text, re.MULTILINE)
    return found[1].strip() if found else platform.processor() or platform.machine()


def _library() -> dict[str, Any]:
    """The compiled library: where it is from, and what it may use here."""
    if native.missing() is not None:  # the reason stands with the backends
        return {"file": "none"}
    path = Path(build.library_path())
    sets = native.instruction_sets()
    found = {"file": str(path), "instructions": f"{sets[0]} in use; there are {' '.join(sets)}"}
    return found | _built(path)


def _cuda_library() -> dict[str, Any]:
    """The CUDA library, where one was built; it may be there without a GPU."""
    if native.missing_cuda() is not None:  # the reason stands with the backends
        return {"file": "none"}
    path = Path(build.cuda_library_path())
    return {"file": str(path)} | _built(path)


def _built(path: Path) -> dict[str, Any]:
    """What a library says of itself."""
    return {f"built: {name}": value for name, value in build.build_info(path).items()}

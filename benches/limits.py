"""The limits of the machine that benches/run.py runs on: arithmetic, caches, copies.

Arithmetic and reads are loops of machine.cpp, compiled for the instruction set that is timed.
"""

from __future__ import annotations

import ctypes
import math
import subprocess
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from recording import ROOT

from fastlstm import build
from fastlstm.cli.timing import Call, seconds_per_call

SECONDS = 0.2  # for each limit
HOP_SECONDS = 0.01
CACHES = Path("/sys/devices/system/cpu/cpu0/cache")


def compiled(instruction_set: str) -> ctypes.CDLL:
    """machine.cpp, for an instruction set of the library; BuildError if that fails."""
    source, folder = Path(__file__).with_name("machine.cpp"), ROOT / "build" / "benches"
    folder.mkdir(parents=True, exist_ok=True)
    library = folder / f"machine-{instruction_set}.so"
    flags = ("-std=c++17", "-O3", "-shared", "-fPIC", "-pthread", *build.ISA_FLAGS[instruction_set])
    words = [*build.find_toolchain().compiler, *flags, str(source), "-o", str(library)]
    done = subprocess.run(words, capture_output=True, text=True)
    if done.returncode != 0:
        raise build.BuildError(f"{source.name} could not be compiled:\n{done.stderr}")
    loaded = ctypes.CDLL(str(library))
    threads, seconds = ctypes.c_int, ctypes.c_double
    for name in ("fma_flops_float", "fma_flops_double", "matrix_unit_flops"):
        function = getattr(loaded, name)
        function.argtypes, function.restype = (threads, seconds), ctypes.c_double
    loaded.read_bytes.argtypes = (threads, ctypes.c_int64, seconds)
    loaded.read_bytes.restype = ctypes.c_double
    loaded.hop_seconds.argtypes, loaded.hop_seconds.restype = (seconds,), ctypes.c_double
    return loaded


def hop(machine: ctypes.CDLL) -> float:
    """Nanoseconds until a thread on another processor sees what this one writes, at present."""
    return machine.hop_seconds(HOP_SECONDS) * 1e9


def caches(folder: Path = CACHES) -> dict[str, int]:
    """Bytes of each level of cache that holds data: ``{"L1": 49152, ...}``; empty if unknown."""
    found = {}
    for entry in sorted(folder.glob("index*")):
        level, kind, size = (
            (entry / name).read_text().strip() for name in ("level", "type", "size")
        )
        if kind != "Instruction":
            found[f"L{level}"] = int(size.removesuffix("K")) * 1024
    return found


def read_sizes(sizes: dict[str, int]) -> dict[str, int]:
    """Bytes that a thread reads to measure each level: what is in it and not in the one before."""
    private = {name: sizes[name] // 2 for name in ("L1", "L2") if name in sizes}
    beyond = 8 * max(private.values(), default=2**24) * 2
    return private | {"L3" if beyond <= sizes.get("L3", 0) // 2 else "memory": beyond}


def measure(machine: ctypes.CDLL, threads: int, sizes: dict[str, int]) -> dict[str, Any]:
    """GF/s of arithmetic by storage and GB/s of reads by level; torch runs so many threads too."""
    fma = {
        "float32": machine.fma_flops_float(threads, SECONDS) / 1e9,
        "float64": machine.fma_flops_double(threads, SECONDS) / 1e9,
    }
    return {
        "fma_gflops": fma,
        "matrix_unit_gflops": machine.matrix_unit_flops(threads, SECONDS) / 1e9,
        "read_gbytes": {
            name: machine.read_bytes(threads, size, SECONDS) / 1e9
            for name, size in read_sizes(sizes).items()
        },
        "copy_gbytes": copy_bandwidth(),
        "matmul_gflops": best_matmul(torch.float32),
    }


def _best_seconds(run: Call) -> float:
    """The fastest call: for a limit, what a noisy machine managed once counts."""
    run()
    best, deadline = math.inf, perf_counter() + SECONDS
    while best == math.inf or perf_counter() < deadline:
        best = min(best, seconds_per_call(run, lambda: None, 1))
    return best


def best_matmul(dtype: torch.dtype) -> float:
    """GF/s of torch's best large square matmul: what a BLAS gets out of these threads."""
    rates = []
    for size in (512, 1024, 2048):
        a, b = torch.randn(2, size, size, dtype=dtype)
        out = torch.empty_like(a)
        rates.append(2 * size**3 / _best_seconds(partial(torch.mm, a, b, out=out)))
    return max(rates) / 1e9


def copy_bandwidth() -> float:
    """GB/s, read plus written, of copying 256 MiB."""
    source = torch.randn(2**26)
    target = torch.empty_like(source)
    return 2 * source.nbytes / _best_seconds(partial(target.copy_, source)) / 1e9

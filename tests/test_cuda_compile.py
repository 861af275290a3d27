"""The CUDA kernels compiled and linked where no GPU is: registers, spills, tensor cores.

Where nvcc is. By default a selection, about a minute on one core; FASTLSTM_COMPILE=all compiles
every instance for every architecture, about four.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from fastlstm import build

try:
    NVCC = build.find_cuda().nvcc
except build.MissingError as error:
    pytest.skip(str(error), allow_module_level=True)

ROOT = Path(__file__).resolve().parent.parent
# Bytes of shared memory that a block can have: A100, H100 and H200, B200.
MOST_SHARED = {"80": 166912, "90a": 232448, "100a": 232448}
REGISTERS, THREADS = 65536, 256
EVERYTHING = [(arch, *each) for arch in MOST_SHARED for each in build.CUDA_INSTANCES]
SELECTION = [
    *(("90a", dtype, pairs) for dtype, pairs in (("bf16", 2), ("bf16", 8), ("f16", 1), ("f32", 4))),
    *(("80", "bf16", 4), ("80", "f32", 8), ("100a", "bf16", 4), ("100a", "f32", 8)),
]
CASES = EVERYTHING if os.environ.get("FASTLSTM_COMPILE") == "all" else SELECTION


class Kernel(NamedTuple):
    """What ptxas says of one, and its SASS."""

    kind: str
    n_tiles: int
    registers: int
    stack: int  # bytes of local memory, spills among them
    sass: str


def tool(name: str) -> str:
    """Of the CUDA toolkit, or as Triton brings it."""
    found = shutil.which(name)
    if found is None:
        triton = pytest.importorskip("triton")
        found = str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name)
    return found


def compiled(arch: str, dtype: str, pairs: int, folder: Path) -> Iterator[Kernel]:
    """The kernels of one object made of walk.cu."""
    output = folder / "walk.cubin"
    done = subprocess.run(
        [NVCC, *build.CUDA_FLAGS, f"-gencode=arch=compute_{arch},code=sm_{arch}", "-cubin",
         "-Xptxas=-v", f"-DFASTLSTM_STORAGE={dtype}", f"-DFASTLSTM_PAIRS={pairs}", "-o", output,
         ROOT / "csrc/cuda/walk.cu"],
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "warning" not in done.stderr, done.stderr
    text = subprocess.check_output(
        [tool("cuobjdump"), "-sass", output], text=True, stderr=subprocess.DEVNULL
    )
    sass = dict(re.findall(r"Function : (\S+)\n(.*?)(?=Function :|\Z)", text, re.DOTALL))
    report = r"properties for (\S+)\n +(\d+) bytes stack.*\n.*Used (\d+) registers"
    for name, stack, registers in re.findall(report, done.stderr):
        kind, n_tiles = re.search(r"lstm_(forward|backward)I.*Li\d+ELi(\d)EE", name).groups()
        yield Kernel(kind, int(n_tiles), int(registers), int(stack), sass[name])


@pytest.fixture(scope="module")
def shared_bytes(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, int, int], int]:
    """By kind, pairs and n_tiles, of all kernels there are: layout.h asked."""
    folder = tmp_path_factory.mktemp("layout")
    program = """
        #include <cstdio>
        #include <initializer_list>
        #include "cuda/layout.h"
        using namespace fastlstm::cuda;
        int main() {
          for (int pairs : {1, 2, 3, 4, 8})
            for (int n_tiles : {1, 2, 4})
              for (Kind kind : {Kind::forward, Kind::backward})
                if (is_compiled(kind, pairs, n_tiles))
                  std::printf("%s %d %d %d\\n", kind == Kind::forward ? "forward" : "backward",
                              pairs, n_tiles, shared_bytes(kind, pairs, n_tiles));
        }"""
    (folder / "layout.cpp").write_text(program)
    compiler = build.find_toolchain().compiler
    words = [*compiler, "-std=c++17", f"-I{ROOT / 'csrc'}", "layout.cpp", "-o", "layout"]
    subprocess.run(words, cwd=folder, check=True)
    rows = map(str.split, subprocess.check_output([folder / "layout"], text=True).splitlines())
    return {(kind, int(pairs), int(n)): int(size) for kind, pairs, n, size in rows}


@pytest.mark.parametrize(("arch", "dtype", "pairs"), CASES, ids=str)
def test_kernels(
    arch: str, dtype: str, pairs: int, shared_bytes: dict[tuple[str, int, int], int], tmp_path: Path
) -> None:
    """No local memory, room for a block, tensor cores, and all reads of rows unrolled."""
    kernels = list(compiled(arch, dtype, pairs, tmp_path))
    expected = {(kind, n) for kind, of, n in shared_bytes if of == pairs}
    assert {(kernel.kind, kernel.n_tiles) for kernel in kernels} == expected
    product = {"f32": "HMMA.1688.F32.TF32", "f16": "HMMA.16816.F32 ", "bf16": "HMMA.16816.F32.BF16"}
    for kernel in kernels:
        what = f"{kernel.kind}, {kernel.n_tiles} eights: {kernel.registers} registers"
        assert kernel.stack == 0, f"{what}, {kernel.stack} bytes of stack"
        assert not re.search(r"\b(LDL|STL)\b", kernel.sass), what
        assert kernel.registers * THREADS <= REGISTERS, what
        depth = pairs if kernel.kind == "forward" else 4 * pairs
        tiles = kernel.n_tiles * (4 if kernel.kind == "forward" else 1)
        assert kernel.sass.count(product[dtype]) == 2 * depth * tiles, what
        # From the L2 cache; and a flag is taken and set at the scope of the device.
        assert kernel.sass.count("LDG.E.128.STRONG.GPU") == depth * kernel.n_tiles, what
        assert re.search(r"LDG\.E\.STRONG\.GPU", kernel.sass), what
        assert re.search(r"MEMBAR\.\w+\.GPU(.*\n)+?.*STG\.E\.STRONG\.GPU", kernel.sass), what


@pytest.mark.parametrize("arch", MOST_SHARED)
def test_shared_memory_fits(arch: str, shared_bytes: dict[tuple[str, int, int], int]) -> None:
    """Of every kind and width at least one kernel; on Hopper and newer, all."""
    fits = {key: size <= MOST_SHARED[arch] for key, size in shared_bytes.items()}
    for kind, pairs, _ in shared_bytes:
        assert fits[kind, pairs, 1], (kind, pairs)
    assert arch == "80" or all(fits.values())


def test_library_links_against_a_torch_without_cuda() -> None:
    """And loads without a driver, and says what is missing."""
    folder = ROOT / "build" / "cuda-test"
    library = build.build_cuda(folder, instances=[("bf16", 1)], architectures=("90a",))
    info = build.build_info(library)
    assert info["sources"] == build.cuda_sources_digest()
    assert info["architectures"] == ["90a"]
    needed = subprocess.check_output(["readelf", "-d", library], text=True)
    assert "libtorch_cpu.so" in needed
    assert not re.search(r"libcuda|libcudart|RPATH|RUNPATH", needed)
    program = (
        "import torch, fastlstm\n"
        "print(fastlstm.available_backends()['cuda'])\n"
        "print(torch.ops.fastlstm_cuda.refusal('float16', 64, 1, 1))\n"
        "print(torch.ops.fastlstm_cuda.refusal('bfloat16', 64, 1, 1))\n"
    )
    env = os.environ | {"FASTLSTM_CUDA_LIBRARY": str(library), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    missing, dtype, driver = done.stdout.splitlines()
    assert missing == "torch finds no CUDA device"
    assert dtype == "no kernel was compiled for 64 units of float16"
    assert driver.startswith("asking what the device holds failed: ")


def test_all_that_is_listed_is_what_a_library_has() -> None:
    source = build._instances_source(build.CUDA_INSTANCES)
    assert source.count("extern const Instance instances_") == len(build.CUDA_INSTANCES) == 15

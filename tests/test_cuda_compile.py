"""The CUDA kernels compiled and linked where no GPU is: registers, spills, tensor cores.

Where nvcc is. By default a selection, about a minute on one core; FASTLSTM_COMPILE=all compiles
every instance for every architecture, about four.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from cuda_compiling import MOST_SHARED, PRODUCT, compiled, printed

from fastlstm import build

ROOT = Path(__file__).resolve().parent.parent
EVERYTHING = [(arch, *each) for arch in MOST_SHARED for each in build.CUDA_INSTANCES]
SELECTION = [
    *(("90a", dtype, pairs) for dtype, pairs in (("bf16", 2), ("bf16", 8), ("f16", 1), ("f32", 4))),
    *(("80", "bf16", 4), ("80", "f32", 8), ("100a", "bf16", 4), ("100a", "f32", 8)),
]
CASES = EVERYTHING if os.environ.get("FASTLSTM_COMPILE") == "all" else SELECTION


@pytest.fixture(scope="module")
def shared_bytes(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, int, int], int]:
    """By kind, pairs and n_tiles, of all kernels there are: layout.h asked."""
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
    rows = printed(program, tmp_path_factory.mktemp("layout"))
    return {(kind, int(pairs), int(n)): int(size) for kind, pairs, n, size in rows}


@pytest.mark.parametrize(("arch", "dtype", "pairs"), CASES, ids=str)
def test_kernels(
    arch: str, dtype: str, pairs: int, shared_bytes: dict[tuple[str, int, int], int], tmp_path: Path
) -> None:
    """No local memory, room for a block, tensor cores, and all reads of rows unrolled."""
    kernels = compiled(
        arch, "walk.cu", (f"STORAGE={dtype}", f"PAIRS={pairs}"), tmp_path / "walk.cubin"
    )
    expected = {(kind, n) for kind, of, n in shared_bytes if of == pairs}
    assert {(kernel.kind, kernel.n_tiles) for kernel in kernels} == expected
    for kernel in kernels:
        kernel.check_resources()
        depth = pairs if kernel.kind == "forward" else 4 * pairs
        tiles = kernel.n_tiles * (4 if kernel.kind == "forward" else 1)
        assert kernel.sass.count(PRODUCT[dtype]) == 2 * depth * tiles, kernel
        # From the L2 cache; and a flag is taken and set at the scope of the device.
        assert kernel.sass.count("LDG.E.128.STRONG.GPU") == depth * kernel.n_tiles, kernel
        assert re.search(r"LDG\.E\.STRONG\.GPU", kernel.sass), kernel
        assert re.search(r"MEMBAR\.\w+\.GPU(.*\n)+?.*STG\.E\.STRONG\.GPU", kernel.sass), kernel


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
    library = build.build_cuda(
        folder, instances=[("bf16", 1)], architectures=("90a",), clusters=[("bf16", 8, 16)]
    )
    info = build.build_info(library)
    assert info["sources"] == build.cuda_sources_digest()
    assert info["architectures"] == ["90a"]
    needed = subprocess.check_output(["readelf", "-d", library], text=True)
    assert "libtorch_cpu.so" in needed
    assert not re.search(r"libcuda|libcudart|RPATH|RUNPATH", needed)
    program = (
        "import torch, fastlstm\n"
        "from fastlstm.cli.info import describe\n"
        "print(describe()['cuda library'])\n"
        "print(fastlstm.available_backends()['cuda'])\n"
        "for dtype in ('float16', 'bfloat16'):\n"
        "    for kernel in ('grid', 'cluster', 'best'):\n"
        "        print(torch.ops.fastlstm_cuda.refusal(dtype, 64, 1, 1, kernel))\n"
    )
    env = os.environ | {"FASTLSTM_CUDA_LIBRARY": str(library), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found, missing, grid, cluster, best, *others = done.stdout.splitlines()
    assert str(library) in found and "'built: architectures': ['90a']" in found
    assert missing == "torch finds no CUDA device"
    assert grid == best, best
    for name, reason in (("", grid), ("cluster ", cluster)):
        assert reason.startswith(f"no {name}kernel was compiled for 64 units of float16; "), reason
    # Both kinds are there for the other, and ask a driver.
    assert len(others) == 3
    for each in others:
        assert each.startswith("asking what the device holds failed: "), each
        assert each.endswith("; the backends 'triton' and 'aten' do not ask"), each


def test_all_that_is_listed_is_what_a_library_has() -> None:
    source = build._instances_source(build.CUDA_INSTANCES, build.CLUSTER_INSTANCES)
    assert source.count("extern const Instance instances_") == len(build.CUDA_INSTANCES) == 15
    assert source.count("extern const Instance clusters_") == len(build.CLUSTER_INSTANCES) == 11


def test_no_fast_math() -> None:
    """The kernels name the approximations that they take: csrc/cuda/math.h."""
    steps = [
        *build._cuda_steps(build.find_toolchain(), ROOT, build.CUDA_INSTANCES, ("90a",)),
        *build._cluster_steps(("90a",), build.CLUSTER_INSTANCES),
    ]
    assert sum(step.rule == "nvcc" for step in steps) == 1 + 15 + 11
    words = " ".join(word for step in steps for word in step.flags)
    assert not re.search(r"fast[-_]math|ftz|prec-div|prec-sqrt|Ofast", words)


@pytest.mark.parametrize(
    ("architectures", "expected"),
    [
        (("90a", "100a", "80"), "90a,sm_90a 100a,sm_100a 90,[sm_90,compute_90]"),
        (("90a",), "90a,[sm_90a,compute_90a]"),
        (("80",), "90,[sm_90,compute_90]"),
    ],
)
def test_clusters_are_compiled_for_who_has_them(
    architectures: tuple[str, ...], expected: str
) -> None:
    """And as PTX for what is newer, where the other kernels are."""
    for step in build._cluster_steps(architectures, build.CLUSTER_INSTANCES):
        codes = [flag.split("compute_", 1)[1] for flag in step.flags if "-gencode" in flag]
        assert " ".join(codes).replace("code=", "") == expected

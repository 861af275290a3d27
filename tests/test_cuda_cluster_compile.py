"""The kernels of thread block clusters compiled where no GPU is: all, for all that have clusters.

Half a minute on two cores.
"""

from __future__ import annotations

import os
import re
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import pytest
from cuda_compiling import MOST_SHARED, PRODUCT, Kernel, compiled, printed

from fastlstm import build

ARCHITECTURES = ("90a", "100a")
CASES = [(arch, *each) for arch in ARCHITECTURES for each in build.CLUSTER_INSTANCES]


class Layout(NamedTuple):
    """What cluster_layout.h says of a kernel."""

    shared_bytes: int
    products: int  # of a step, by a warp


@pytest.fixture(scope="module")
def layouts(
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[tuple[str, int, int], dict[tuple[str, int], Layout]]:
    """By storage, blocks and units; and then by kind and n_tiles."""
    program = """
        #include <cstdio>
        #include "cuda/cluster_layout.h"
        using namespace fastlstm;
        using namespace fastlstm::cuda;
        template <Storage storage, int blocks, int units, int n_tiles, Kind kind>
        void line(const char* name) {
          if constexpr (is_compiled(storage, blocks, units, n_tiles)) {
            using C = ClusterConfig<kind, storage, blocks, units, n_tiles>;
            std::printf("%s %d %d %s %d %d %d\\n", name, blocks, units,
                        kind == Kind::forward ? "forward" : "backward", n_tiles, C::shared_bytes,
                        2 * C::pairs * C::m_tiles * C::n_tiles);
          }
        }
        template <Storage storage, int blocks, int units>
        void lines(const char* name) {
          line<storage, blocks, units, 1, Kind::forward>(name);
          line<storage, blocks, units, 2, Kind::forward>(name);
          line<storage, blocks, units, 4, Kind::forward>(name);
          line<storage, blocks, units, 1, Kind::backward>(name);
          line<storage, blocks, units, 2, Kind::backward>(name);
          line<storage, blocks, units, 4, Kind::backward>(name);
        }
        int main() { INSTANCES }"""
    calls = [
        f'lines<Storage::{dtype}, {blocks}, {units}>("{dtype}");'
        for dtype, blocks, units in build.CLUSTER_INSTANCES
    ]
    rows = printed(program.replace("INSTANCES", " ".join(calls)), tmp_path_factory.mktemp("layout"))
    found: dict[tuple[str, int, int], dict[tuple[str, int], Layout]] = {}
    for dtype, blocks, units, kind, n_tiles, shared, products in rows:
        kernels = found.setdefault((dtype, int(blocks), int(units)), {})
        kernels[kind, int(n_tiles)] = Layout(int(shared), int(products))
    return found


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple, list[Kernel]]:
    """Of every case, compiled by as many processes as there are cores."""
    folder = tmp_path_factory.mktemp("cluster")

    def compile_case(case: tuple[str, str, int, int]) -> list[Kernel]:
        arch, dtype, blocks, units = case
        words = (f"STORAGE={dtype}", f"BLOCKS={blocks}", f"UNITS={units}")
        name = f"{arch}.{dtype}.{blocks}x{units}.cubin"
        return compiled(arch, "cluster.cu", words, folder / name)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return dict(zip(CASES, pool.map(compile_case, CASES), strict=True))


@pytest.mark.parametrize("case", CASES, ids=lambda case: "{}-{}-{}x{}".format(*case))
def test_kernels(
    case: tuple[str, str, int, int],
    kernels: dict[tuple, list[Kernel]],
    layouts: dict[tuple[str, int, int], dict[tuple[str, int], Layout]],
) -> None:
    """No local memory, room for a block, tensor cores; and exchange through shared memory alone."""
    arch, dtype, blocks, units = case
    expected = layouts[dtype, blocks, units]
    assert {(kernel.kind, kernel.n_tiles) for kernel in kernels[case]} == set(expected)
    for kernel in kernels[case]:
        kernel.check_resources()
        layout = expected[kernel.kind, kernel.n_tiles]
        assert layout.shared_bytes <= MOST_SHARED[arch], kernel
        # The backward walk multiplies in two places: before its first step too.
        times = 1 if kernel.kind == "forward" else 2
        assert kernel.sass.count(PRODUCT[dtype]) == times * layout.products, kernel
        check_exchange(kernel)


def check_exchange(kernel: Kernel) -> None:
    """Stores into other blocks' shared memory that count at an mbarrier, and what belongs to it."""
    sass = kernel.sass
    sent, not_sent = ("128", "64") if kernel.kind == "forward" else ("64", "128")
    assert f"STAS.{sent} " in sass and f"STAS.{not_sent} " not in sass, kernel
    assert sass.count("SYNCS.EXCH.64") == 2, kernel  # two mailboxes are initialised
    assert "SYNCS.ARRIVE.TRANS64" in sass and "SYNCS.PHASECHK.TRANS64" in sass, kernel
    # A cluster meets before the first is sent and after the last has come in.
    first, last = sass.index("UCGABAR_WAIT"), sass.rindex("UCGABAR_WAIT")
    sends = [found.start() for found in re.finditer(r"STAS\.", sass)]
    assert sass.rindex("SYNCS.EXCH.64") < first < min(sends) <= max(sends) < last, kernel
    # Nothing is exchanged through the L2 cache.
    assert "STRONG.GPU" not in sass, kernel


@pytest.mark.parametrize("dtype", ["bf16", "f16", "f32"])
def test_every_width_and_slice_that_is_promised(
    dtype: str, layouts: dict[tuple[str, int, int], dict[tuple[str, int], Layout]]
) -> None:
    """Up to 512 units of two bytes and 256 of four; slices of 8 and 16 sequences of all, of 32
    where blocks have 16 units."""
    widths = {
        blocks * units: set(kernels)
        for (of, blocks, units), kernels in layouts.items()
        if of == dtype and units == 16
    }
    widest = 256 if dtype == "f32" else 512
    assert max(blocks * units for of, blocks, units in layouts if of == dtype) == widest
    both = ("forward", "backward")
    assert widths[128] == widths[256] == {(kind, n) for kind in both for n in (1, 2, 4)}
    for (of, _, units), kernels in layouts.items():
        if of == dtype and units == 32:
            assert set(kernels) == {(kind, n) for kind in both for n in (1, 2)}

"""What the tests that compile the CUDA kernels share: nvcc, what ptxas says, and the SASS."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import pytest

from fastlstm import build

try:
    NVCC = build.find_cuda().nvcc
except build.MissingError as error:
    pytest.skip(str(error), allow_module_level=True)

CSRC = Path(__file__).resolve().parent.parent / "csrc"
# Bytes of shared memory that a block can have: A100, H100 and H200, B200.
MOST_SHARED = {"80": 166912, "90a": 232448, "100a": 232448}
REGISTERS, THREADS = 65536, 256
# An instruction of a product.
PRODUCT = {"f32": "HMMA.1688.F32.TF32", "f16": "HMMA.16816.F32 ", "bf16": "HMMA.16816.F32.BF16"}
REPORT = (
    r"properties for (\S+)\n +(\d+) bytes stack frame, (\d+) bytes spill stores, "
    r"(\d+) bytes spill loads\n.*Used (\d+) registers"
)


class Kernel(NamedTuple):
    """What ptxas says of one, and its SASS."""

    kind: str
    n_tiles: int
    registers: int
    local: int  # bytes of stack, and of spills
    sass: str

    def __str__(self) -> str:
        return f"{self.kind}, {self.n_tiles} eights: {self.registers} registers"

    def check_resources(self) -> None:
        """All values are in registers, and a block's registers are on a multiprocessor."""
        assert self.local == 0, f"{self}, {self.local} bytes of local memory"
        assert not re.search(r"\b(LDL|STL)\b", self.sass), self
        assert self.registers * THREADS <= REGISTERS, self


def tool(name: str) -> str:
    """Of the CUDA toolkit, or as Triton brings it."""
    found = shutil.which(name)
    if found is None:
        triton = pytest.importorskip("triton")
        found = str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name)
    return found


def compiled(arch: str, source: str, defines: Iterable[str], output: Path) -> list[Kernel]:
    """The kernels of one object made of csrc/cuda/``source``."""
    done = subprocess.run(
        [NVCC, *build.CUDA_FLAGS, f"-gencode=arch=compute_{arch},code=sm_{arch}", "-cubin",
         "-Xptxas=-v", *(f"-DFASTLSTM_{word}" for word in defines), "-o", output,
         CSRC / "cuda" / source],
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "warning" not in done.stderr, done.stderr
    text = subprocess.check_output(
        [tool("cuobjdump"), "-sass", output], text=True, stderr=subprocess.DEVNULL
    )
    sass = dict(re.findall(r"Function : (\S+)\n(.*?)(?=Function :|\Z)", text, re.DOTALL))
    found = []
    for name, *numbers, registers in re.findall(REPORT, done.stderr):
        kind, n_tiles = re.search(r"lstm_(forward|backward)\w*?I.*Li(\d)EE", name).groups()
        local = sum(map(int, numbers))
        found.append(Kernel(kind, int(n_tiles), int(registers), local, sass[name]))
    return found


def printed(program: str, folder: Path) -> list[Sequence[str]]:
    """The words of each line that a C++ program prints of the headers."""
    (folder / "program.cpp").write_text(program)
    compiler = build.find_toolchain().compiler
    words = [*compiler, "-std=c++17", f"-I{CSRC}", "program.cpp", "-o", "program"]
    subprocess.run(words, cwd=folder, check=True)
    text = subprocess.check_output([folder / "program"], text=True)
    return [line.split() for line in text.splitlines()]

"""The C++ kernels as they choose on other processors than this one.

What is multiplied ahead, asked for in advance, shared by threads or cut into parts depends on who
made the processor and on its L2 cache: each way through is to be tested on every machine.
"""

from __future__ import annotations

import itertools
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import settings
from cases import LARGER, LAYERS, Layer, make_layer
from fastlstm import cpu, native, reference
from kernel_checks import Kernels, need_of, random_gradients

pytest_plugins = ["cpu_fixtures"]
pytestmark = pytest.mark.usefixtures("poison")

CPU = Kernels(cpu, torch.device("cpu"))
MULTIPLY_BFLOAT16 = [s for s in native.instruction_sets() if s in ("amx", "avx512_bf16")]
# bfloat16 where it is multiplied: elsewhere the kernels of float32 read and write it.
SETS = [
    *((name, torch.float32) for name in native.instruction_sets()),
    *((name, torch.bfloat16) for name in MULTIPLY_BFLOAT16),
]
SMALL, LARGE = 1 << 13, 1 << 24  # bytes of L2 cache
PROCESSORS = [
    *((maker, size) for maker in ("intel", "amd") for size in (SMALL, LARGE)),
    ("other", SMALL),
    ("other", 16_000),
]
# What few rows do hardly depends on it.
CASES = [
    *(case for case in LAYERS if len(case.batch_sizes) > 1 and case.batch_sizes[0] > 5),
    *LARGER,
    Layer((40, 40, 33, 20, 7), 64, 150, reset=0.1, batch=42),
    Layer((70, 66, 14, 3), 66, 40, directions=2),
    # Enough rows for three threads to have sequences of their own, and weights that do not decide.
    Layer((48,) * 16, 33, 20),
    Layer((48,) * 16, 33, 20, directions=2, reset=0.2),
]


@pytest.fixture(params=PROCESSORS, ids=lambda p: f"{p[0]}-{p[1]}")
def processor(request) -> Iterator[None]:
    before = native.assume_processor(*request.param)
    yield
    assert native.assume_processor(*before) == request.param


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize(("instruction_set", "dtype"), SETS, indirect=["instruction_set"], ids=str)
def test_layer_equals_reference(
    case: Layer, dtype: torch.dtype, processor: None, instruction_set: str
) -> None:
    layer = make_layer(case, dtype)
    want = reference.layer_forward(*layer, True, True)
    grads = random_gradients(want)
    inputs = (*layer, want.reserve(), need_of(case))
    want_back = reference.layer_backward(grads, *inputs)
    spares = (False, True) if instruction_set in MULTIPLY_BFLOAT16 else (True,)
    for threads, spared in itertools.product((1, 3), spares):
        native.spare_matrix_unit(spared)
        with settings.threads(threads):
            got = cpu.layer_forward(*layer, True, True)
            got_back = cpu.layer_backward(grads, *inputs)
        CPU.assert_near(got, want, dtype)
        CPU.assert_near(got_back, want_back, dtype)


def test_the_processor_at_hand() -> None:
    """What the library found of it by itself."""
    before = native.assume_processor("other", 1)
    assert native.assume_processor(*before) == ("other", 1)
    vendors = {"GenuineIntel": "intel", "AuthenticAMD": "amd"}
    found = re.search(r"^vendor_id\s*: (\w+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    maker = vendors.get(found[1] if found else "", "other")
    size = subprocess.check_output(["getconf", "LEVEL2_CACHE_SIZE"], text=True)
    assert before == (maker, int(size.strip() or 0) or 1 << 20)


@pytest.mark.parametrize(
    ("maker", "size", "says"),
    [
        ("GenuineIntel", 1, "maker: got 'GenuineIntel', expected intel, amd or other"),
        ("intel", 0, "l2_cache_bytes: got 0, expected 1 to 2\\^40"),
        ("amd", 2**63 - 1, "l2_cache_bytes: got 9223372036854775807, expected 1 to 2\\^40"),
    ],
)
def test_refuses(maker: str, size: int, says: str) -> None:
    with pytest.raises(RuntimeError, match=says):
        native.assume_processor(maker, size)

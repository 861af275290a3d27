"""The C++ kernels as they choose on other processors than this one.

What is multiplied ahead, asked for in advance, shared by threads or cut into parts depends on who
made the processor and on its L2 cache: each way through is to be tested on every machine.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
import torch

from cases import LARGER, LAYERS, Layer, make_layer
from fastlstm import cpu, native, reference
from kernel_checks import Kernels, need_of, random_gradients

pytest_plugins = ["cpu_fixtures"]
pytestmark = pytest.mark.usefixtures("poison")

CPU = Kernels(cpu, torch.device("cpu"))
SMALL, LARGE = 1 << 13, 1 << 24  # bytes of L2 cache
PROCESSORS = [
    *((maker, size) for maker in ("intel", "amd") for size in (SMALL, LARGE)),
    ("another", SMALL),
]
# What few rows do hardly depends on it.
CASES = [
    *(case for case in LAYERS if len(case.batch_sizes) > 1 and case.batch_sizes[0] > 5),
    *LARGER,
    Layer((40, 40, 33, 20, 7), 64, 150, reset=0.1, batch=42),
    Layer((70, 66, 14, 3), 66, 40, directions=2),
]


@pytest.fixture(params=PROCESSORS, ids=lambda p: f"{p[0]}-{p[1] >> 10}K")
def processor(request) -> Iterator[None]:
    native.assume_processor(*request.param)
    yield
    native.assume_processor("", 0)


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_layer_equals_reference(
    case: Layer, dtype: torch.dtype, processor: None, instruction_set: str
) -> None:
    layer = make_layer(case, dtype)
    want = reference.layer_forward(*layer, True, True)
    grads = random_gradients(want)
    inputs = (*layer, want.reserve(), need_of(case))
    want_back = reference.layer_backward(grads, *inputs)
    before = torch.get_num_threads()
    try:
        for threads, spared in itertools.product((1, 3), (False, True)):
            torch.set_num_threads(threads)
            native.spare_matrix_unit(spared)
            CPU.assert_near(cpu.layer_forward(*layer, True, True), want, dtype)
            CPU.assert_near(cpu.layer_backward(grads, *inputs), want_back, dtype)
    finally:
        torch.set_num_threads(before)


def test_refuses_a_cache_without_bytes() -> None:
    with pytest.raises(RuntimeError, match="l2_cache_bytes: got 0, expected a positive number"):
        native.assume_processor("intel", 0)

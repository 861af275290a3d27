"""What the tests of the CUDA kernels share: where they run, what they walk, and fixtures."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

import emulated
from cases import Layer
from fastlstm import cuda as backend
from fastlstm import native
from fastlstm.contract import Gradients, OutputGradients, Outputs
from kernel_checks import ALL, Kernels

ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda:0" if ON_GPU else "cpu")
KERNELS = Kernels(backend, DEVICE, tf32=True)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# Three blocks to a team, the last of them half full; two slices; both directions.
PACKED = Layer((10, 9, 9, 2), 6, 40, directions=2, reset=0.3)

emulator_only = pytest.mark.skipif(ON_GPU, reason="the emulator's: it needs no GPU")


@pytest.fixture(scope="module", autouse=True)
def library() -> Iterator[None]:
    """On a GPU the library that was built; else the emulator."""
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    if ON_GPU:
        reason = native.missing_cuda()
        if reason is not None and "was not built" in reason:
            pytest.skip(reason)
        assert reason is None, reason
        yield
    else:
        with emulated.emulator():
            yield
    torch.backends.cuda.matmul.fp32_precision = before


@pytest.fixture(autouse=True)
def poison(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """New tensors start as NaNs: what is not written shows. And nothing may be left to report."""
    monkeypatch.setattr(backend, "POLLS", min(backend.POLLS, 1 << 20))  # less than a second
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3, device=DEVICE).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)
    if ON_GPU:
        torch.cuda.synchronize()
    else:
        emulated.reset()
    backend.check(DEVICE)


@pytest.fixture(params=["grid", "cluster"])
def kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each kind of kernel, whatever the rule would take."""
    if ON_GPU and request.param == "cluster" and torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("this GPU has no thread block clusters")
    monkeypatch.setattr(backend, "KERNEL", request.param)
    return request.param


def both_walks(case: Layer = PACKED) -> tuple[Outputs, Gradients]:
    """Forward and backward in bfloat16."""
    layer = KERNELS.layer(case, torch.bfloat16)
    out = backend.layer_forward(*layer, True, True)
    need = ALL._replace(w_hr=False)
    return out, backend.layer_backward(OutputGradients(*out[:4]), *layer, out.reserve(), need)

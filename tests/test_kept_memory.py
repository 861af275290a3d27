"""What a training step makes lies in memory that the last step had: csrc/cpu/scratch.cpp."""

from __future__ import annotations

import io
import subprocess
import sys
import threading
from itertools import pairwise
from pathlib import Path

import pytest
import torch

import fastlstm
from cases import tolerance
from fastlstm import cpu, native
from fastlstm.contract import Outputs, Weights

assert native.missing() is None, native.missing()
MIB = 1 << 20


def forward(steps: int, batch: int = 8, hidden: int = 128, need_cells: bool = False) -> Outputs:
    """One layer that will be undone: 6 * steps * batch * hidden floats."""
    weights = [Weights(*(torch.randn(4 * hidden, n) / 16 for n in (hidden, hidden)), None, None)]
    state = torch.randn(1, batch, hidden)
    batch_sizes = torch.full((steps,), batch)
    x = torch.randn(steps * batch, hidden)
    return cpu.layer_forward(x, batch_sizes, state, state, weights, None, True, need_cells)


def places(out: Outputs) -> set[int]:
    return {out.gates.data_ptr(), out.c_all.data_ptr(), out.y.data_ptr()}


def test_reserves_in_use_lie_apart():
    outs = [forward(400) for _ in range(3)]
    spans = sorted((t.data_ptr(), t.nbytes) for out in outs for t in (out.gates, out.c_all, out.y))
    for (start, size), (following, _) in pairwise(spans):
        assert start + size <= following


def resizable(tensor: torch.Tensor) -> bool:
    return tensor.untyped_storage().resizable()


def test_only_what_torch_does_not_resize_is_kept():
    """Outputs that require a gradient, and gradients; what inference makes is torch's own."""
    module, x = fastlstm.LSTM(128, 256), torch.randn(400, 8, 128, requires_grad=True)
    with torch.no_grad():
        assert resizable(module(x)[0])
    output = module(x)[0]
    assert not resizable(output)
    with pytest.raises(RuntimeError, match="resize"):
        output.resize_(3)
    output.sum().backward()
    assert not resizable(module.weight_hh_l0.grad)
    assert not resizable(x.grad)


def check_gradients():
    module, x = fastlstm.LSTM(128, 256), torch.randn(400, 8, 128, requires_grad=True)
    places = []
    for _ in range(3):
        module.zero_grad()
        x.grad = None
        module(x)[0].square().sum().backward()
        gradients = [x.grad, module.weight_hh_l0.grad]  # a mebibyte and more
        assert not any(map(resizable, gradients))
        places.append({g.data_ptr() for g in gradients})
        del gradients
    assert places[1] & places[2]
    gradient = module.weight_hh_l0.grad
    before = gradient.clone()
    file = io.BytesIO()
    torch.save(gradient, file)
    file.seek(0)
    for copy in (torch.load(file), gradient.numpy(), gradient.share_memory_(), gradient):
        torch.testing.assert_close(torch.as_tensor(copy), before, rtol=0, atol=0)
    module(x)[0].square().sum().backward()
    torch.testing.assert_close(gradient, 2 * before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_of_what_is_kept(dtype):
    """Two graphs of a layer with all that is saved, undone in both orders, in kept memory."""
    module = fastlstm.LSTM(24, 96, proj_size=40, dtype=dtype, backend="cpu")
    weights = list(module.parameters())
    inputs = [torch.randn(250, 32, 24, dtype=dtype) for _ in range(2)]

    def gradients(order: list[int]) -> list[list[torch.Tensor]]:
        outputs = [module(x)[0].float().square().sum() for x in inputs]
        found = {k: list(torch.autograd.grad(outputs[k], weights)) for k in order}
        return [found[0], found[1]]

    module.backend = "reference"
    want = gradients([0, 1])
    module.backend = "cpu"
    for order in ([0, 1], [1, 0], [0, 1]):
        for mine, theirs in zip(gradients(order), want, strict=True):
            for a, b in zip(mine, theirs, strict=True):
                scale = max(1.0, float(b.abs().max()))
                torch.testing.assert_close(a / scale, b / scale, **tolerance(dtype))


def lazily_freed() -> int:
    """Bytes that the system may take."""
    for line in Path("/proc/self/smaps_rollup").read_text().splitlines():
        if line.startswith("LazyFree:"):
            return int(line.split()[1]) * 1024
    raise KeyError("LazyFree")


def test_the_system_may_take_what_is_kept():
    """The kernel counts such pages late, up to sixty megabytes of them: half is enough."""
    out = forward(16000)
    size, before = out.gates.nbytes + out.c_all.nbytes + out.y.nbytes, lazily_freed()
    assert size > 256 * MIB
    del out
    assert lazily_freed() - before > size / 2
    assert forward(16000).gates.isfinite().all()
    assert lazily_freed() - before > size / 2  # and again


GROWING = """
from test_kept_memory import forward, lazily_freed

largest = 0
for steps in (4000, 5600, 8000, 2800, 11200, 16000, 4000, 22400):
    out = forward(steps)
    largest = max(largest, out.gates.nbytes + out.c_all.nbytes + out.y.nbytes)
    del out
print(lazily_freed() / largest)
"""


AGAIN = """
from test_kept_memory import forward, places

first = places(forward(400))
# A block may be a quarter larger than what is asked for.
print(places(forward(400)) == first, places(forward(360)) == first)
"""


HELD = """
from test_kept_memory import forward, lazily_freed

for _ in range(4):
    forward(400)
print(lazily_freed())
"""


SMALLER = """
from test_kept_memory import forward, lazily_freed

forward(16000)
for _ in range(3):
    forward(5000)  # less than 128 MiB
before = lazily_freed()
out = forward(5000)
print(before, before - lazily_freed())
"""


HOLDING = """
import resource
import torch
import fastlstm

torch.set_num_threads(1)
module = fastlstm.LSTM(256, 256)
inputs = torch.randn(128, 16, 256)
faults, before = 0, 0
for step in range(40):
    module.zero_grad()
    x = inputs.clone().requires_grad_()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    y, _ = module(x)  # until here the y of the step before is held
    if step >= 10:
        faults += resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
    y.backward(torch.ones_like(y))
print(faults / 30)
"""


def run(program: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=Path(__file__).parent, capture_output=True, text=True, check=True,
    )  # fmt: skip
    return done.stdout


def test_a_step_gets_the_memory_of_the_last():
    """In a process of its own: other tests leave blocks that fit as well."""
    assert run(AGAIN) == "True True\n"


def test_gradients_are_kept_and_are_tensors_like_others():
    run("from test_kept_memory import check_gradients; check_gradients()")


def test_little_is_held_as_it_is():
    assert int(run(HELD)) == 0


def test_a_small_model_after_a_large_one_is_held_as_it_is():
    offered, taken = map(int, run(SMALLER).split())
    assert offered > 64 * MIB and taken < 32 * MIB


def test_a_program_that_holds_an_output_finds_the_rest_again():
    """A block that is missing is not made of one that is needed next: no pages are new."""
    assert float(run(HOLDING)) < 2


def test_what_is_kept_was_in_use_at_once():
    # All of them together would be 3.3; malloc may keep a block that was given back to it.
    assert 0.5 < float(run(GROWING)) < 1.5


def test_threads_share_it():
    """Steps of several threads at once, of shapes that fit each other's blocks."""
    module = fastlstm.LSTM(64, 128)
    inputs = [torch.randn(200 + 10 * k, 8, 64) for k in range(4)]

    def gradient(x: torch.Tensor) -> torch.Tensor:
        output, _ = module(x)
        return torch.autograd.grad(output.square().sum(), module.weight_hh_l0)[0]

    want = [gradient(x) for x in inputs]
    wrong: list[int] = []

    def work(k: int) -> None:
        for _ in range(20):
            if not torch.equal(gradient(inputs[k]), want[k]):
                wrong.append(k)

    threads = [threading.Thread(target=work, args=(k,)) for k in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong

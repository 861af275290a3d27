"""What happens to modules in programs: devices without memory, processes, threads, transforms."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from typing import Any

import parallel_region
import pytest
import torch
from parallel_region import REGION
from test_module import assert_same, flat, make_pair, values_and_gradients
from torch import nn
from torch.func import functional_call, grad, stack_module_state, vmap
from torch.nn.utils.rnn import pack_padded_sequence
from torch.utils.data import DataLoader

import fastlstm
from cases import tolerance
from fastlstm import build

IN, H = 4, 6


@pytest.mark.parametrize("kind", [fastlstm.LSTM, fastlstm.LSTMCell])
def test_modules_without_memory_get_it_later(kind):
    for module in (
        kind(IN, H, device="meta").to_empty(device="cpu"),
        nn.utils.skip_init(kind, IN, H),
    ):
        module.reset_parameters()
        assert all(t.isfinite().all() for t in flat(module(torch.randn(5, IN))))


def test_called_inside_another_parallel_region(tmp_path):
    """By every thread of an OpenMP region: right, and no thread waits for one that is not there."""
    source, library = tmp_path / "region.cpp", tmp_path / "region.so"
    source.write_text(REGION)
    compiler = build.find_toolchain().compiler
    subprocess.run([*compiler, "-shared", "-fPIC", "-fopenmp", source, "-o", library], check=True)
    done = subprocess.run(
        [sys.executable, parallel_region.__file__, library],
        capture_output=True, text=True, timeout=120, env={**os.environ, "OMP_NUM_THREADS": "2"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["10"]  # two threads, five times


class Encoded(torch.utils.data.Dataset):
    """Runs a module in the workers of a DataLoader."""

    def __init__(self, module: nn.Module) -> None:
        self.module, self.x = module, torch.randn(4, 5, IN)

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, k: int) -> torch.Tensor:
        with torch.no_grad():
            return self.module(self.x[k])[0]


def test_shared_memory_and_workers_forked_after_use():
    module = fastlstm.LSTM(IN, H, 2).share_memory()
    assert all(p.is_shared() for p in module.parameters())
    data = Encoded(module)
    want = torch.stack([data[k] for k in range(4)])  # used here before the fork
    got = torch.cat(list(DataLoader(data, num_workers=2)))
    assert_same([got], [want], want.dtype)


def test_threads_at_once_and_changing_their_number():
    module, x = fastlstm.LSTM(IN, 40, 2, bidirectional=True), torch.randn(30, 9, IN)
    names, parameters = zip(*module.named_parameters(), strict=True)

    def gradients():
        return torch.autograd.grad(module(x)[0].square().sum(), parameters)

    want, wrong = gradients(), []

    def work() -> None:
        for _ in range(5):
            for name, a, b in zip(names, gradients(), want, strict=True):
                scale = float(b.abs().max())
                if not torch.allclose(a / scale, b / scale, **tolerance(x.dtype)):
                    wrong.append(name)

    threads = [threading.Thread(target=work) for _ in range(3)]
    before = torch.get_num_threads()
    try:
        for thread in threads:
            thread.start()
        for count in (1, 2, 1, 2):
            torch.set_num_threads(count)
            work()
    finally:
        torch.set_num_threads(before)
        for thread in threads:
            thread.join()
    assert not wrong


def test_inference_mode_and_its_tensors():
    module, x = fastlstm.LSTM(IN, H, bidirectional=True), torch.randn(5, 2, IN)
    with torch.inference_mode():
        inside = flat(module(x))
    assert inside[0].is_inference()
    assert_same([t.clone() for t in inside], flat(module(x)), x.dtype)


@pytest.mark.parametrize("backend", ["cpu", "aten", "reference"])
@pytest.mark.parametrize("kept", [False, True], ids=["plain", "checkpoint"])
def test_another_default_device_changes_nothing(kept, backend):
    """What a call makes for itself lies where it is needed, not where new tensors would."""
    x = torch.randn(5, 3, IN)
    packed = pack_padded_sequence(x, [2, 5, 4], enforce_sorted=False)
    modules = [
        fastlstm.LSTM(IN, H, bidirectional=both, backend=backend, checkpoint=kept)
        for both in (False, True)
    ]
    arguments: list[dict[str, Any]] = [{"input": x}, {"input": packed}]
    arguments.append({"input": x, "lengths": [2, 5, 4]})
    if backend != "aten":  # which has neither
        arguments.append({"input": x, "reset": torch.rand(5, 3) < 0.3, "return_cells": True})

    def run(module: fastlstm.LSTM, given: dict[str, Any]) -> list[torch.Tensor]:
        values = flat(module(**given))
        wanted = list(module.parameters())
        return [*values, *torch.autograd.grad(values[0].sum(), wanted), *flat(gates(module, given))]

    def gates(module: fastlstm.LSTM, given: dict[str, Any]) -> Any:
        return fastlstm.gates(module, **{k: v for k, v in given.items() if k != "return_cells"})

    pairs = [(module, given) for module in modules for given in arguments]
    want = [run(*pair) for pair in pairs]
    with torch.device("meta"):
        got = [run(*pair) for pair in pairs]
    for a, e in zip(got, want, strict=True):
        assert_same(a, e, x.dtype)


CHANGED = {
    "bidirectional": (torch.float32, {"bidirectional": True, "num_layers": 2}),
    "proj": (torch.float32, {"proj_size": 2}),
    "float64": (torch.float64, {}),
    "packed": (torch.float32, {}),
}


@pytest.mark.parametrize("kept", [False, True], ids=["plain", "checkpoint"])
@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("name", CHANGED)
def test_output_may_be_changed_where_nn_lstms_may(name, backend, kept):
    """In place before the backward pass, as by ReLU(inplace=True): whatever is not oneDNN's."""
    dtype, config = CHANGED[name]
    stock, ours = make_pair(dtype, backend, **config)
    ours.checkpoint = kept

    def run(module, x):
        if name == "packed":
            x = pack_padded_sequence(x, [5, 4, 2])
        output, _ = module(x)
        values = output.data if name == "packed" else output
        return values.relu_()

    x = torch.randn(5, 3, IN, dtype=dtype)
    want = values_and_gradients(stock, run, [x])
    assert_same(values_and_gradients(ours, run, [x]), want, dtype)


def test_what_onednn_makes_is_not_changed():
    modules = make_pair(torch.float32)

    def change(module, **options):
        output, _ = module(torch.randn(5, 3, IN), **options)
        output.relu_()
        output.sum().backward()

    for module in modules:
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            change(module)
        with torch.backends.mkldnn.flags(enabled=False):
            change(module)
    for lengths in ([5] * 3, [2, 5, 4]):
        change(modules[1], lengths=lengths)


def test_complex_numbers_go_through_the_reference():
    stock, ours = make_pair(torch.complex64)
    x = torch.randn(5, 3, 4, dtype=torch.complex64)
    for a, b in zip(flat(ours(x)), flat(stock(x)), strict=True):
        torch.testing.assert_close(a, b, **tolerance(torch.float32))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_ensembles_and_gradients_of_each_sample(dtype):
    modules = [fastlstm.LSTM(IN, H, 2, dtype=dtype) for _ in range(3)]
    parameters, buffers = stack_module_state(modules)
    x = torch.randn(5, 2, IN, dtype=dtype)

    def call(weights, state, x):
        return functional_call(modules[0], (weights, state), (x,))[0]

    together = vmap(call, in_dims=(0, 0, None))(parameters, buffers, x)
    near = tolerance(dtype)
    for got, module in zip(together, modules, strict=True):
        torch.testing.assert_close(got, module(x)[0], **near)

    module = modules[0]
    weights = dict(module.named_parameters())

    def loss(weights, sample):  # sample (T, IN)
        return functional_call(module, weights, (sample,))[0].square().sum()

    each = vmap(grad(loss), in_dims=(None, 1))(weights, x)
    for b in range(2):
        alone = torch.autograd.grad(loss(weights, x[:, b]), list(weights.values()))
        for name, want in zip(weights, alone, strict=True):
            assert want.abs().max() > 0
            torch.testing.assert_close(each[name][b], want, **near)

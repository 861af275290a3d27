"""pytest-benchmark: the layer and the module at the shapes of tests/cases.py.

Run ``pytest benches/test_bench_layer.py``.  For ratios use run.py: its rivals are timed in turn.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

import fastlstm
from fastlstm.autograd import lstm_layer
from fastlstm.cli.arguments import Shape
from fastlstm.cli.compare import difference
from fastlstm.cli.contest import Contest, flops

sys.path.append(str(Path(__file__).resolve().parent.parent / "tests"))

from cases import SPEED, Layer, LayerTensors, make_layer

MODES = ("train", "infer")
BACKENDS = [
    name
    for name, missing in fastlstm.available_backends().items()
    if missing is None and name != "reference"
]

# The uppermost mark varies fastest: backends share what is computed for a shape and a mode.
shapes = pytest.mark.parametrize("shape", SPEED, ids="T{0[0]}-B{0[1]}-I{0[2]}-H{0[3]}".format)
modes = pytest.mark.parametrize("mode", MODES)


def layer_step(layer: LayerTensors, dy: Tensor, mode: str, backend: str) -> list[Tensor]:
    """y, h_n and c_n, and in training the gradients of all inputs."""
    with torch.set_grad_enabled(mode == "train"):
        y, _, h_n, c_n = lstm_layer(*layer, backend=backend)
    if mode == "infer":
        return [y, h_n, c_n]
    leaves = [layer.x, layer.h0, layer.c0, *(t for t in layer.weights[0] if t is not None)]
    return [y, h_n, c_n, *torch.autograd.grad(y, leaves, dy)]


@functools.lru_cache(maxsize=1)
def layer_and_expected(shape: Shape, mode: str) -> tuple[LayerTensors, Tensor, list[Tensor]]:
    """Inputs, the gradient of y, and the results of the reference, which is slow."""
    steps, batch, inputs, hidden = shape
    torch.manual_seed(0)
    layer = make_layer(Layer((batch,) * steps, inputs, hidden), torch.float32, requires_grad=True)
    dy = torch.randn(steps * batch, hidden)
    return layer, dy, layer_step(layer, dy, mode, "reference")


def time(benchmark, run: Callable[[], object], shape: Shape, mode: str, before=None) -> None:
    work = flops(shape, mode)
    benchmark.extra_info["gflop"] = work / 1e9
    benchmark.pedantic(run, setup=before, rounds=20 if work < 1e10 else 5, warmup_rounds=1)


@pytest.mark.parametrize("backend", BACKENDS)
@modes
@shapes
def test_layer(benchmark, shape: Shape, mode: str, backend: str) -> None:
    benchmark.group = f"layer {mode} {shape}"
    layer, dy, expected = layer_and_expected(shape, mode)
    results = layer_step(layer, dy, mode, backend)
    problems = [difference(a, b) for a, b in zip(results, expected, strict=True)]
    assert not any(problems), problems
    del results
    time(benchmark, lambda: layer_step(layer, dy, mode, backend), shape, mode)


@pytest.mark.parametrize("who", ["ours", "theirs"])
@modes
@shapes
def test_module(benchmark, shape: Shape, mode: str, who: str) -> None:
    benchmark.group = f"module {mode} {shape}"
    contest = Contest(shape, torch.float32)
    assert contest.problem() is None
    module = getattr(contest, who).train(mode == "train")
    step = contest.train if mode == "train" else contest.infer
    time(benchmark, lambda: step(module), shape, mode, contest.clear)

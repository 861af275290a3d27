"""LSTM(checkpoint=True) and layers in chunks: the same results, and little memory."""

from __future__ import annotations

import contextlib
import copy
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_module import CONFIGS, IN, B, H, T, assert_same, flat, make_pair, values_and_gradients
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence
from torch.utils.flop_counter import FlopCounterMode

import fastlstm
from cases import LAYERS, Layer, make_layer, tolerance
from fastlstm import checkpoint, cpu, reference
from fastlstm.contract import OutputGradients, Requested, by_kind

pytest_plugins = ["cpu_fixtures"]
ALL = Requested(*[True] * 7)


@pytest.fixture(autouse=True)
def short_chunks(monkeypatch):
    """A step each, where the real ones would hold all of these sequences."""
    monkeypatch.setattr(checkpoint, "chunk_steps", lambda steps, x, c0: 1)


def assert_near(actual, expected, dtype):
    for name in expected._fields:
        got, want = getattr(actual, name), getattr(expected, name)
        assert (got is None) == (want is None), name
        if not isinstance(want, list):
            got, want = [got], [want]
        for a, e in zip(got, want, strict=True):
            if e is not None:
                torch.testing.assert_close(a, e, **tolerance(dtype))


# What torch's own LSTM can do.
ATEN_LAYERS = [c for c in LAYERS if not c.reset and sum(c.batch_sizes) and c.batch is None]


@pytest.mark.parametrize(
    ("backend", "case"),
    [
        *((backend, case) for backend in ("reference", "cpu") for case in LAYERS),
        *(("aten", case) for case in ATEN_LAYERS),
    ],
    ids=str,
)
def test_a_layer_in_chunks_is_the_layer(backend: str, case: Layer) -> None:
    dtype, aten = torch.float64, backend == "aten"
    layer = make_layer(case, dtype)
    want = reference.layer_forward(*layer, True, True)
    grads = OutputGradients(*(torch.randn_like(t) for t in want[:4]))
    if aten:
        grads = grads._replace(c_all=None)
    need = ALL._replace(bias=case.bias, w_hr=bool(case.projection))
    got, saved = checkpoint.layer_forward(*layer, not aten, backend)
    kept = want._replace(gates=None, m=None, c_all=None if aten else want.c_all)
    assert_near(got, kept, dtype)
    assert len(saved.c) == len(case.batch_sizes) + 1
    assert_near(
        checkpoint.layer_backward(grads, *layer, saved, need, backend),
        reference.layer_backward(grads, *layer, want.reserve(), need),
        dtype,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    "case", [c for c in LAYERS if c.directions == 1 and sum(c.batch_sizes)], ids=str
)
def test_a_reserve_is_made_again(case: Layer, dtype: torch.dtype, poison: None) -> None:
    """From y alone, by the kernels and by the reference, with NaN in all new memory."""
    layer = make_layer(case, dtype)
    want = reference.layer_forward(*layer, True, True).reserve()
    for recompute in (reference.layer_recompute, cpu.layer_recompute):
        got = recompute(*layer, want.y)
        assert_near(got, want, dtype)
        assert [t.dtype for t in got if t is not None] == [t.dtype for t in want if t is not None]


@pytest.mark.parametrize(
    ("backend", "form"),
    [
        *(
            (backend, form)
            for backend in ("cpu", "reference")
            for form in ("padded", "packed", "lengths", "reset", "cells")
        ),
        *(("aten", form) for form in ("padded", "packed")),  # what torch's own LSTM can do
    ],
)
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_the_module_is_the_same(config, backend, form):
    config = {**config, "dropout": 0.4 if config.get("num_layers") else 0.0}
    _, plain = make_pair(torch.float64, backend, **config)
    ours = fastlstm.LSTM(IN, H, dtype=torch.float64, backend=backend, checkpoint=True, **config)
    ours.load_state_dict(plain.state_dict())
    reset = torch.rand(T, B) < 0.3

    def run(module, x):
        torch.manual_seed(3)  # the masks of dropout are drawn once, and in the same order
        if form == "packed":
            return module(pack_padded_sequence(x, [2, 5, 4], enforce_sorted=False))
        arguments = {"lengths": {"lengths": [2, 5, 0]}, "reset": {"reset": reset}}
        return module(x, **arguments.get(form, {"return_cells": form == "cells"}))

    x = torch.randn(T, B, IN, dtype=torch.float64)
    assert_same(
        values_and_gradients(ours, run, [x]), values_and_gradients(plain, run, [x]), x.dtype
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_real_chunks_in_every_storage_type(dtype, monkeypatch):
    monkeypatch.undo()
    x, module = torch.randn(300, 5, 8).to(dtype), fastlstm.LSTM(8, 24, dtype=dtype)
    kept = fastlstm.LSTM(8, 24, dtype=dtype, checkpoint=True)
    kept.load_state_dict(module.state_dict())

    def run(module, x):
        return module(x)[0]

    got, want = (values_and_gradients(m, run, [x]) for m in (kept, module))
    for a, e in zip(got, want, strict=True):
        scale = max(1.0, float(e.detach().abs().max()))  # sums over many rows, on their own scale
        torch.testing.assert_close(a.double() / scale, e.double() / scale, **tolerance(dtype))


def test_second_order_and_partial_gradients():
    ours = fastlstm.LSTM(2, 3, bidirectional=True, checkpoint=True, dtype=torch.float64)
    ours.weight_hh_l0.requires_grad_(False)

    def run(x, h, c):
        return flat(ours(x, (h, c)))

    shapes = ((3, 2, 2), (2, 2, 3), (2, 2, 3))
    leaves = [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in shapes]
    assert torch.autograd.gradcheck(run, leaves)
    assert torch.autograd.gradgradcheck(run, leaves)
    flat(ours(leaves[0]))[0].sum().backward()
    assert ours.weight_hh_l0.grad is None
    assert ours.weight_ih_l0.grad is not None


@pytest.mark.parametrize("around", ["all", "backward"])
@pytest.mark.parametrize("kept", [False, True], ids=["plain", "checkpoint"])
@pytest.mark.parametrize("backend", ["cpu", "reference", "aten"])
def test_training_under_a_dispatch_mode(backend, kept, around):
    """There operators run without autograd, though torch may be who differentiates a backend."""
    ours = fastlstm.LSTM(IN, H, bidirectional=True, backend=backend, checkpoint=kept)
    x = torch.randn(T, B, IN)

    def run(mode_of_forward, mode_of_backward):
        ours.zero_grad()
        leaf = x.clone().requires_grad_()
        with mode_of_forward:
            output = ours(leaf)[0]
        with mode_of_backward:
            output.square().sum().backward()
        return [leaf.grad, *(p.grad.clone() for p in ours.parameters())]

    nothing = contextlib.nullcontext()
    counter = FlopCounterMode(display=False) if around == "all" else nothing
    got = run(counter, FlopCounterMode(display=False))
    for a, e in zip(got, run(nothing, nothing), strict=True):
        torch.testing.assert_close(a, e, **tolerance(torch.float32))


def test_it_compiles_with_every_length(monkeypatch):
    monkeypatch.undo()
    ours = fastlstm.LSTM(IN, H, 2, bidirectional=True, checkpoint=True)
    compiled = torch.compile(ours, fullgraph=True, dynamic=True, backend="aot_eager")
    for steps, batch in ((7, 2), (90, 3)):
        x = torch.randn(steps, batch, IN)
        assert_same(
            values_and_gradients(ours, lambda _, t: compiled(t), [x]),
            values_and_gradients(ours, lambda _, t: ours(t), [x]),
            x.dtype,
        )


@pytest.mark.parametrize("case", [Layer((2, 2, 1), 2, 3), Layer((2, 1), 2, 3, 2, 2, reset=0.4)])
def test_operators_pass_opcheck(case: Layer) -> None:
    layer = make_layer(case, torch.float32)
    x, batch_sizes, h0, c0, weights, reset = layer
    inputs = (x, batch_sizes, h0, c0, *by_kind(weights), reset)
    forward = torch.ops.fastlstm.checkpoint_forward.default
    torch.library.opcheck(forward, (*inputs, True, "cpu"))
    y, c_all, h_n, c_n, borders = forward(*inputs, True, "cpu")
    grads = [torch.randn_like(t) for t in (y, c_all, h_n, c_n)]
    torch.library.opcheck(
        torch.ops.fastlstm.checkpoint_backward.default,
        (*grads, *inputs, y, borders, [True, False, True, True, False, True, True], "cpu"),
    )


def test_the_attribute_is_a_modules_own():
    ours = fastlstm.LSTM(IN, H, checkpoint=True)
    assert repr(ours) == f"LSTM({IN}, {H}, checkpoint=True)"
    assert copy.deepcopy(ours).checkpoint and pickle.loads(pickle.dumps(ours)).checkpoint
    assert fastlstm.restore_lstm_(ours).replaced == [""]
    assert "checkpoint" not in vars(ours)
    assert repr(ours) == repr(nn.LSTM(IN, H))
    with pytest.raises(TypeError):
        fastlstm.LSTM(IN, H, 1, True, False, 0.0, False, 0, None, None, "auto", True)


def test_memory_of_a_long_sequence():
    """The peak of a step at T = 4096 beyond input, output and gradients: measured, 16 times."""
    script = Path(__file__).with_name("peak_memory.py")

    def peak(kept: bool) -> int:
        command = [sys.executable, str(script), str(kept), "4096", "8", "128"]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        return int(done.stdout.split()[0])

    assert peak(False) > 4 * peak(True)

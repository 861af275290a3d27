"""What leaves Python: torch.export, AOTInductor, torch.jit and torch.fx."""

from __future__ import annotations

import io
import re
import warnings
from pathlib import Path

import pytest
import torch
from torch import Tensor, fx, nn
from torch.export import Dim
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import fastlstm
from cases import tolerance

T, B, IN, H = 5, 3, 4, 6
SIZES = ((T, B), (9, 2), (1, 1))  # the first is what is traced
CONFIGS = {
    "plain": {},
    "all": {"num_layers": 2, "bidirectional": True, "batch_first": True, "bias": False},
    "projected": {"num_layers": 2, "proj_size": 2},
}


class Model(nn.Module):
    """A model around the LSTM, and every one of its outputs."""

    def __init__(self, leaf: type[nn.RNNBase] = fastlstm.LSTM, **config) -> None:
        super().__init__()
        self.lstm = leaf(IN, H, **config)

    def forward(self, x: Tensor, hx: tuple[Tensor, Tensor] | None = None):
        output, (h_n, c_n) = self.lstm(2 * x, hx)
        return output.tanh(), h_n, c_n


def make_input(model: Model, steps: int, batch: int) -> Tensor:
    return torch.randn(*((batch, steps) if model.lstm.batch_first else (steps, batch)), IN)


def assert_same(program, model: Model) -> None:
    """At every size, with a zero state."""
    for steps, batch in SIZES:
        x = make_input(model, steps, batch)
        for actual, expected in zip(program(x), model(x), strict=True):
            torch.testing.assert_close(actual, expected, **tolerance(x.dtype))


def exported(model: Model, strict: bool = False) -> torch.export.ExportedProgram:
    sizes = {0: Dim.DYNAMIC, 1: Dim.DYNAMIC}
    x = make_input(model, *SIZES[0])
    return torch.export.export(model, (x,), dynamic_shapes={"x": sizes}, strict=strict)


@pytest.mark.parametrize(
    ("config", "strict"),
    [(CONFIGS["plain"], True), (CONFIGS["all"], False), (CONFIGS["projected"], True)],
)
def test_export_with_dynamic_steps_and_batch(config, strict, tmp_path: Path) -> None:
    model = Model(**config)
    program = exported(model, strict)
    assert "fastlstm.layer_forward" in str(program.graph_module.print_readable(print_output=False))
    assert_same(program.module(), model)
    torch.export.save(program, tmp_path / "model.pt2")
    assert_same(torch.export.load(tmp_path / "model.pt2").module(), model)


@pytest.mark.parametrize(
    "config", [*CONFIGS.values(), dict(checkpoint=True)], ids=[*CONFIGS, "checkpoint"]
)
def test_exported_program_trains(config) -> None:
    model = Model(**config)
    program = exported(model).module()
    x = make_input(model, 9, 2)
    for run in (program, model):
        model.zero_grad()
        output, h_n, c_n = run(x)
        (output.sum() + h_n.sum() + c_n.square().sum()).backward()
        if run is program:
            mine = {name: p.grad.clone() for name, p in model.named_parameters()}
    # They share their parameters.
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(mine[name], parameter.grad, **tolerance(x.dtype))


@pytest.mark.parametrize("example", [(7, 5), (100, 8)], ids=str)
def test_a_program_in_chunks_has_any_number_of_them(example: tuple[int, int]) -> None:
    model = fastlstm.LSTM(3, 4, checkpoint=True)
    sizes = {"input": {0: torch.export.Dim.AUTO, 1: torch.export.Dim.AUTO}}
    program = torch.export.export(model, (torch.randn(*example, 3),), dynamic_shapes=sizes).module()
    for steps, batch in ((7, 5), (26, 5), (1, 8), (1000, 8)):
        x = torch.randn(steps, batch, 3)
        found = []
        for run in (program, model):
            model.zero_grad()
            run(x)[0].square().sum().backward()
            found.append([p.grad.clone() for p in model.parameters()])
        for got, want in zip(*found, strict=True):
            torch.testing.assert_close(got, want)
        assert found[0][0].any()


def test_program_exported_without_gradients_says_so() -> None:
    model = Model()
    with torch.no_grad():
        program = exported(model).module()
    x = make_input(model, 9, 2)
    assert_same(program, model)
    with pytest.raises(RuntimeError, match="kept nothing for a backward pass"):
        program(x)[0].sum().backward()


def test_exported_program_is_differentiated_once() -> None:
    model = Model()
    x = make_input(model, 9, 2).requires_grad_()
    output, *_ = exported(model).module()(x)
    (slope,) = torch.autograd.grad(output.sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        slope.square().sum().backward()


def aot_compiled(program: torch.export.ExportedProgram, folder: Path):
    """Through a file, as whoever deploys it would."""
    quick = {"aot_inductor.compile_wrapper_opt_level": "O0"}
    with warnings.catch_warnings(action="ignore", category=FutureWarning):  # torch's, of its own
        package = torch._inductor.aoti_compile_and_package(
            program, package_path=str(folder / "model.pt2"), inductor_configs=quick
        )
        return torch._inductor.aoti_load_package(package)


def test_aot_inductor(tmp_path: Path) -> None:
    model = Model(num_layers=2, bidirectional=True).eval()
    program = aot_compiled(exported(model), tmp_path)
    with torch.no_grad():
        assert_same(program, model)


class Ragged(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = fastlstm.LSTM(IN, H, 2, bidirectional=True)

    def forward(self, x: Tensor, lengths: Tensor):
        output, (h_n, c_n) = self.lstm(x, lengths=lengths)
        return output.tanh(), h_n, c_n


@pytest.mark.parametrize("inductor", [False, True])
def test_export_with_lengths(inductor: bool, tmp_path: Path) -> None:
    """How many rows are packed is known when the program runs, and how long a sequence may be."""
    model, any_size = Ragged().requires_grad_(False), Dim.DYNAMIC
    sizes = {"x": {0: any_size, 1: any_size}, "lengths": {0: any_size}}
    args = torch.randn(T, B, IN), torch.tensor([T, 0, 2])
    program = torch.export.export(model, args, dynamic_shapes=sizes)
    run = aot_compiled(program, tmp_path) if inductor else program.module()
    for lengths in ([T, 0, 2], [9, 9], [0, 0, 0, 1]):
        args = torch.randn(max(lengths), len(lengths), IN), torch.tensor(lengths)
        for actual, expected in zip(run(*args), model(*args), strict=True):
            torch.testing.assert_close(actual, expected, **tolerance(torch.float32))
    with pytest.raises((ValueError, RuntimeError), match="lengths: expected values from 0 to 5"):
        run(torch.randn(5, 2, IN), torch.tensor([3, 6]))


# --- torch.jit ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("leaf", "grad", "config"),
    [
        (fastlstm.LSTM, True, CONFIGS["plain"]),
        (fastlstm.LSTM, False, CONFIGS["all"]),
        (fastlstm.compat.LSTM, True, CONFIGS["projected"]),
    ],
)
def test_jit_trace_records_torchs_own(leaf, grad, config) -> None:
    model = Model(leaf, **config)
    x = make_input(model, *SIZES[0])
    with torch.set_grad_enabled(grad):
        traced = torch.jit.trace(model, (x,))
    buffer = io.BytesIO()
    torch.jit.save(traced, buffer)
    buffer.seek(0)
    loaded = torch.jit.load(buffer)
    assert "aten::lstm" in str(loaded.inlined_graph)
    assert not {"fastlstm::", "fastlstm_C::"} & set(re.findall(r"\w+::", str(loaded.inlined_graph)))
    assert_same(loaded, model)
    for run in (loaded, model):
        run(make_input(model, *SIZES[0]).fill_(0.5))[0].sum().backward()
    mine = dict(loaded.named_parameters())
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(mine[name].grad, parameter.grad, **tolerance(x.dtype))


@pytest.mark.parametrize("batched", [True, False])
def test_jit_trace_with_a_state(batched: bool) -> None:
    model = Model()
    sizes = (B,) if batched else ()
    x, *hx = (torch.randn(n, *sizes, k) for n, k in ((T, IN), (1, H), (1, H)))
    traced = torch.jit.trace(model, (x, tuple(hx)))
    for actual, expected in zip(traced(x, tuple(hx)), model(x, tuple(hx)), strict=True):
        torch.testing.assert_close(actual, expected, **tolerance(x.dtype))


@pytest.mark.parametrize("with_hx", [False, True])
def test_jit_trace_of_packed_rows(with_hx: bool) -> None:
    lstm = fastlstm.LSTM(IN, H, bidirectional=True).requires_grad_(False)
    hx = tuple(torch.randn(2, 2, B, H)) if with_hx else None

    def run(data: Tensor, batch_sizes: Tensor, order: Tensor, unsort: Tensor):
        output, state = lstm(PackedSequence(data, batch_sizes, order, unsort), hx)
        return output.data, *state

    def packed(*lengths: int) -> PackedSequence:
        return pack_padded_sequence(torch.randn(T, B, IN), lengths, enforce_sorted=False)

    with warnings.catch_warnings(action="ignore"):  # of PackedSequence's own checks
        traced = torch.jit.trace(run, tuple(packed(2, 5, 3)), check_trace=False)
        for sequences in (packed(2, 5, 3), packed(1, 1, 4)):
            for actual, expected in zip(traced(*sequences), run(*sequences), strict=True):
                torch.testing.assert_close(actual, expected, **tolerance(torch.float32))


@pytest.mark.parametrize("option", ["lengths", "reset", "return_cells"])
def test_jit_trace_refuses_what_torchs_own_has_not(option: str) -> None:
    lstm, x = fastlstm.LSTM(IN, H), torch.randn(T, B, IN)
    values = {"lengths": [T] * B, "reset": torch.zeros(T, B, dtype=torch.bool)}
    options = {option: values.get(option, True)}
    with pytest.raises(RuntimeError, match=rf"{option}: torch\.jit\.trace records torch's own"):
        torch.jit.trace(lambda x: lstm(x, **options)[0], (x,))


def test_jit_trace_refuses_a_named_backend() -> None:
    lstm = fastlstm.LSTM(IN, H, backend="reference")
    with pytest.raises(RuntimeError, match=r"backend 'reference' is not: use backend='auto'"):
        torch.jit.trace(lstm, (torch.randn(T, B, IN),))


def test_jit_script_says_what_to_use() -> None:
    model = Model()
    with pytest.raises(RuntimeError, match=r"fastlstm\.restore_lstm_\(model\)"):
        torch.jit.script(model)
    fastlstm.restore_lstm_(model)
    x = torch.randn(T, B, IN)
    scripted = torch.jit.script(nn.Sequential(model.lstm))
    torch.testing.assert_close(scripted(x)[0], model.lstm(x)[0])


# --- torch.fx ----------------------------------------------------------------------------


class Tagger(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = fastlstm.LSTM(IN, H)

    def forward(self, x, lengths):
        output, (h_n, _) = self.lstm(x, lengths=lengths)
        return output.relu() + h_n


def test_fx_takes_the_module_as_a_leaf() -> None:
    model = Tagger()
    traced = fx.symbolic_trace(model)
    (node,) = (node for node in traced.graph.nodes if node.op == "call_module")
    assert traced.get_submodule(node.target) is model.lstm
    for lengths in ([5, 1, 0], [2, 3, 4]):
        x, lengths = torch.randn(T, B, IN), torch.tensor(lengths)
        torch.testing.assert_close(traced(x, lengths), model(x, lengths))


def test_fx_of_the_module_alone_says_what_is_wrong() -> None:
    constant = {"hx": None, "lengths": None, "reset": None, "return_cells": False}
    with pytest.raises(RuntimeError, match="recorded as a leaf of the model it is part of"):
        fx.symbolic_trace(fastlstm.LSTM(IN, H), concrete_args=constant)

"""fastlstm.gates against the equations, written out one step of one sequence at a time."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from test_module import CONFIGS, FORMS, IN, B, H, T, make_pair, make_state
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

import fastlstm
from cases import tolerance
from fastlstm import backends


def equations(stock: nn.LSTM, x: Tensor, h0: Tensor, c0: Tensor, layer: int, reset: Tensor):
    """i, f, g, o (T, D*H) of one sequence x (T, IN) in float64, by (eq. 1 to 4) as they stand."""
    directions = 2 if stock.bidirectional else 1
    weights = {name: p.detach().double() for name, p in stock.named_parameters()}
    rows, found = x.double(), []
    for k in range(layer + 1):
        outputs, found = [], []
        for d in range(directions):
            suffix = f"l{k}" + "_reverse" * d
            w = {name.removesuffix(f"_{suffix}"): p for name, p in weights.items()
                 if name.endswith(f"_{suffix}")}  # fmt: skip
            h, c = h0[k * directions + d].double(), c0[k * directions + d].double()
            order = range(len(rows))[:: -1 if d else 1]
            steps = {}
            for t in order:
                # The first step of a segment, seen from where this direction comes.
                if reset[t] if d == 0 else t + 1 < len(rows) and reset[t + 1]:
                    h, c = torch.zeros_like(h), torch.zeros_like(c)
                a = w["weight_ih"] @ rows[t] + w["weight_hh"] @ h
                a = a + w.get("bias_ih", 0) + w.get("bias_hh", 0)
                i, f, g, o = a.chunk(4)
                i, f, g, o = i.sigmoid(), f.sigmoid(), g.tanh(), o.sigmoid()
                c = f * c + i * g
                h = o * c.tanh()
                h = w["weight_hr"] @ h if "weight_hr" in w else h
                steps[t] = (h, i, f, g, o)
            in_time = [steps[t] for t in range(len(rows))]
            h_all, *gates = (torch.stack(kind) for kind in zip(*in_time, strict=True))
            outputs.append(h_all)
            found.append(gates)
        rows = torch.cat(outputs, -1)
    return [torch.cat(kind, -1) for kind in zip(*found, strict=True)]


def all_equations(stock: nn.LSTM, x: Tensor, state, layer: int, lengths, reset: Tensor):
    """The same for a batch x (T, B, IN): four of (T, B, D*H), zero beyond each length."""
    width = H * (2 if stock.bidirectional else 1)
    found = [torch.zeros(T, B, width, dtype=torch.float64) for _ in "ifgo"]
    for b, n in enumerate(lengths):
        if n == 0:
            continue
        alone = equations(stock, x[:n, b], state[0][:, b], state[1][:, b], layer, reset[:n, b])
        for gate, part in zip(found, alone, strict=True):
            gate[:n, b] = part
    return found


def check(found: fastlstm.inspect.Gates, expected: list[Tensor], dtype: torch.dtype) -> None:
    assert found._fields == ("i", "f", "g", "o")
    for gate, right in zip(found, expected, strict=True):
        assert not gate.requires_grad
        torch.testing.assert_close(gate, right.to(dtype), **tolerance(dtype))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_gates_are_those_of_the_equations(config, form):
    stock, ours = make_pair(batch_first="batch_first" in form, **config)
    x, state, reset = torch.randn(T, B, IN).double(), make_state(stock), torch.rand(T, B) < 0.3
    lengths = {"packed": [5, 4, 2], "packed_unsorted": [2, 5, 4]}.get(form, [T] * B)
    for layer in range(stock.num_layers):
        expected = all_equations(stock, x, state, layer, lengths, reset)
        if "packed" in form:
            packed, marks = (
                pack_padded_sequence(t, lengths, enforce_sorted=form == "packed")
                for t in (x, reset)
            )
            found = fastlstm.gates(ours, packed, state, reset=marks, layer=layer)
            assert all(torch.equal(gate.batch_sizes, packed.batch_sizes) for gate in found)
            found = type(found)(*(pad_packed_sequence(gate)[0] for gate in found))
        elif "unbatched" in form:
            first = (state[0][:, 0], state[1][:, 0])
            found = fastlstm.gates(ours, x[:, 0], first, reset=reset[:, 0], layer=layer)
            expected = [gate[:, 0] for gate in expected]
        elif form == "batch_first":
            found = fastlstm.gates(ours, x.transpose(0, 1), state, reset=reset.t(), layer=layer)
            expected = [gate.transpose(0, 1) for gate in expected]
        else:
            found = fastlstm.gates(ours, x, state, reset=reset, layer=layer)
        check(found, expected, x.dtype)


@pytest.mark.parametrize("backend", ["cpu", "aten", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_every_backend_and_dtype_with_lengths(dtype, backend):
    stock, ours = make_pair(dtype, backend, num_layers=2, bidirectional=True)
    x, state = torch.randn(T, B, IN).to(dtype), make_state(stock)
    lengths = [2, 5, 1 if backend == "aten" else 0]  # torch's own wants steps
    expected = all_equations(stock, x, state, 1, lengths, torch.zeros(T, B))
    check(fastlstm.gates(ours, x, state, lengths=lengths), expected, dtype)


@pytest.mark.parametrize(
    ("backend", "keeper"),
    [("auto", "cpu"), ("cpu", "cpu"), ("reference", "reference"), ("aten", "cpu")],
)
def test_the_modules_backend_is_asked_once_for_each_layer_up_to_it(backend, keeper, monkeypatch):
    asked = []

    def spy(entry: backends.Backend):
        def forward(*args):
            asked.append((entry.name, args[6]))  # (.., need_reserve)
            return entry.layer_forward(*args)

        return dataclasses.replace(entry, layer_forward=forward)

    table = {name: spy(entry) for name, entry in backends._TABLE.items()}
    monkeypatch.setattr(backends, "_TABLE", table)
    monkeypatch.setattr(backends, "_AUTOMATIC", tuple(table[n] for n in ("cpu", "reference")))
    fastlstm.gates(fastlstm.LSTM(IN, H, 3, backend=backend), torch.randn(T, B, IN), layer=1)
    first = keeper if backend == "auto" else backend
    assert asked == [(first, False), (keeper, True)]


@pytest.mark.parametrize("backend", ["cpu", "aten", "reference"])
def test_nothing_has_no_gates(backend):
    lstm = fastlstm.LSTM(IN, H, backend=backend)
    assert fastlstm.gates(lstm, torch.zeros(T, 0, IN)).i.shape == (T, 0, H)
    found = fastlstm.gates(lstm, torch.zeros(T, B, IN), lengths=[0] * B)
    assert not any(gate.any() for gate in found) and found.o.shape == (T, B, H)


def test_gates_and_cells_fulfil_the_equations():
    """What the docstring promises, for an initial state of zero."""
    lstm = fastlstm.LSTM(IN, H).double()
    x = torch.randn(T, B, IN).double()
    output, _, cells = lstm(x, return_cells=True)
    i, f, g, o = fastlstm.gates(lstm, x)
    before = torch.cat((torch.zeros_like(cells[:1]), cells[:-1]))
    torch.testing.assert_close(cells, f * before + i * g)
    torch.testing.assert_close(output, o * cells.tanh())


def test_gates_under_vmap_and_autocast():
    lstm = fastlstm.LSTM(IN, H)
    x = torch.randn(2, T, B, IN)
    each = [fastlstm.gates(lstm, part) for part in x]
    alone = [torch.stack(gate) for gate in zip(*each, strict=True)]
    check(torch.func.vmap(lambda part: fastlstm.gates(lstm, part))(x), alone, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        found = fastlstm.gates(lstm, x[0])
    check(found, [gate[0] for gate in alone], torch.bfloat16)


def test_bad_arguments_are_named():
    lstm, x = fastlstm.LSTM(IN, H, 2), torch.randn(T, B, IN)
    with pytest.raises(TypeError, match=r"module: expected a fastlstm\.LSTM, got Linear"):
        fastlstm.gates(nn.Linear(2, 2), x)
    with pytest.raises(TypeError, match=r"module: .*replace_lstm_"):
        fastlstm.gates(nn.LSTM(IN, H), x)
    for layer in (2, -3):
        with pytest.raises(IndexError, match=f"layer: expected one of 2 layers, got {layer}"):
            fastlstm.gates(lstm, x, layer=layer)
    for layer in ("0", 0.0, None):
        with pytest.raises(TypeError, match="layer: expected an integer, got "):
            fastlstm.gates(lstm, x, layer=layer)
    with pytest.raises(RuntimeError, match="input_size"):
        fastlstm.gates(lstm, x[..., 1:])
    assert isinstance(fastlstm.gates(lstm, x, layer=-2).i, Tensor)
    packed = pack_padded_sequence(x, [5, 4, 2])
    assert isinstance(fastlstm.gates(lstm, packed).i, PackedSequence)

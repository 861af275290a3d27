"""fastlstm.LSTMCell against torch.nn.LSTMCell, and single steps against whole sequences."""

from __future__ import annotations

import copy
import dataclasses
import pickle
import statistics
import time
from typing import Any

import pytest
import torch
from test_module import assert_same, flat, values_and_gradients
from torch import nn
from torch.nn.utils import parametrizations

import fastlstm
import settings
from cases import tolerance
from fastlstm import backends, native

BACKENDS = ["auto", "reference", "aten", "cpu"]
B, IN, H = 3, 4, 6


def make_pair(dtype: torch.dtype = torch.float64, backend: str = "auto", bias: bool = True):
    stock = nn.LSTMCell(IN, H, bias, dtype=dtype)
    ours = fastlstm.LSTMCell(IN, H, bias, dtype=dtype, backend=backend)
    ours.load_state_dict(stock.state_dict())
    return stock, ours


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("with_hx", [False, True])
@pytest.mark.parametrize("lead", [(B,), (1,), (0,), ()], ids=str)
def test_values_and_gradients_are_those_of_nn_lstm_cell(lead, with_hx, bias, dtype, backend):
    stock, ours = make_pair(dtype, backend, bias)
    leaves = [torch.randn(*lead, IN, dtype=dtype)]
    if with_hx:
        leaves += [torch.randn(*lead, H, dtype=dtype), torch.randn(*lead, H, dtype=dtype)]

    def run(module, x, *hx):
        return module(x, hx or None)

    assert_same(
        values_and_gradients(ours, run, leaves), values_and_gradients(stock, run, leaves), dtype
    )
    with torch.no_grad():
        assert_same(flat(run(ours, *leaves)), flat(run(stock, *leaves)), dtype)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_single_steps_are_the_whole_sequence(backend, dtype):
    """LSTM with T = 1 and LSTMCell, carrying (h, c), against one call; gradients too."""
    lstm = fastlstm.LSTM(IN, H, dtype=dtype, backend=backend)
    cell = fastlstm.LSTMCell(IN, H, dtype=dtype, backend=backend)
    cell.load_state_dict({k.removesuffix("_l0"): v for k, v in lstm.state_dict().items()})
    x = torch.randn(7, B, IN).to(dtype).requires_grad_()
    whole, state = lstm(x)
    stepwise: list[list[Any]] = [[], []]
    hx, one = None, None
    for step in x:
        y, hx = lstm(step[None], hx)
        one = cell(step, one)
        stepwise[0].append(y[0])
        stepwise[1].append(one[0])
    for outputs, last in zip(stepwise, (hx, one), strict=True):
        got, near = torch.stack(outputs), tolerance(dtype)
        torch.testing.assert_close(got, whole, **near)
        torch.testing.assert_close(last[1].view(B, H), state[1][0], **near)
        (a,) = torch.autograd.grad(got.float().sum(), x, retain_graph=True)
        (b,) = torch.autograd.grad(whole.float().sum(), x, retain_graph=True)
        torch.testing.assert_close(a, b, **near)


@pytest.mark.parametrize("graph", [False, True])
def test_steps_of_a_batch_run_on_the_kernels(monkeypatch, graph):
    """One without rows, or of a sequence that comes alone, on torch's own."""
    seen = []
    real = torch._VF.lstm_cell
    monkeypatch.setattr(torch._VF, "lstm_cell", lambda *a: seen.append(a) or real(*a))
    stock, ours = nn.LSTMCell(400, 400), fastlstm.LSTMCell(400, 400)
    ours.load_state_dict(stock.state_dict())
    x = torch.randn(5, 400)
    with torch.set_grad_enabled(graph):
        for rows in (x, x[:1]):
            want = stock(rows)
            del seen[:]
            assert_same(flat(ours(rows)), flat(want), x.dtype)
        fastlstm.LSTMCell(40, 40)(x[:, :40])
        assert not seen
        ours(x[:0])
        ours(x[0])
        assert len(seen) == 2


@pytest.mark.parametrize("unit", [False, True])
@pytest.mark.parametrize("instructions", [False, True])
def test_only_large_steps_in_bfloat16_are_torchs_own(monkeypatch, instructions, unit):
    """Where the processor has instructions for it; without gradients, a matrix unit."""
    monkeypatch.setattr(native, "multiplies_bfloat16", lambda: instructions)
    monkeypatch.setattr(native, "has_matrix_unit", lambda: instructions and unit)

    def is_torchs_own(rows: int, size: int, graph: bool, dtype: torch.dtype = torch.bfloat16):
        return backends.is_torchs_own_step(torch.zeros(rows, size, dtype=dtype), size, graph)

    assert is_torchs_own(1, 256, graph=True) is instructions
    assert is_torchs_own(5, 512, graph=False) is (instructions and unit)
    assert not is_torchs_own(64, 128, graph=True)
    assert not is_torchs_own(64, 256, graph=False)
    assert not is_torchs_own(4, 512, graph=False)
    for dtype in (torch.float16, torch.float32, torch.float64):
        for graph in (False, True):
            assert not is_torchs_own(64, 512, graph, dtype)


@pytest.mark.parametrize("backend", ["auto", "cpu"])
def test_a_gradient_is_made_of_whatever_asks_for_one(backend):
    """Each of the arguments and weights alone, and some two of them."""
    stock, ours = make_pair(backend=backend)
    sizes = dict(x=IN, h=H, c=H)
    leaves = {name: torch.randn(B, n, dtype=torch.float64) for name, n in sizes.items()}
    names = [*leaves, *dict(stock.named_parameters())]
    for asked in [{name} for name in names] + [{"h", "c"}, {"weight_ih", "weight_hh"}]:
        grads = []
        for module in (stock, ours):
            made = {n: t.clone().requires_grad_(n in asked) for n, t in leaves.items()}
            for name, weight in module.named_parameters():
                weight.requires_grad_(name in asked)
            h, c = module(made["x"], (made["h"], made["c"]))
            wanted = {**made, **dict(module.named_parameters())}
            grads.append(
                torch.autograd.grad((h * c).sum(), [wanted[n] for n in names if n in asked])
            )
        assert_same(*grads, torch.float64)


@pytest.mark.parametrize("biased", [True, False])
def test_second_order_is_that_of_nn_lstm_cell(biased):
    stock, ours = make_pair(bias=biased)
    leaves = [torch.randn(B, n, dtype=torch.float64, requires_grad=True) for n in (IN, H, H)]

    def second(module):
        inputs = [*leaves, *module.parameters()]
        h, c = module(leaves[0], (leaves[1], leaves[2]))
        first = torch.autograd.grad((h.sin() * c).sum(), inputs, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first), inputs)

    assert_same(second(ours), second(stock), torch.float64)
    assert torch.autograd.gradgradcheck(
        lambda x, h, c: ours(x, (h, c)), [t.detach().clone().requires_grad_() for t in leaves]
    )


def test_gradients_come_in_batches_too():
    stock, ours = make_pair()
    x = torch.randn(B, IN, dtype=torch.float64, requires_grad=True)
    hx = [torch.randn(B, H, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    seeds = torch.randn(4, B, H, dtype=torch.float64)
    for graph in (False, True):
        got, want = (
            torch.autograd.grad(
                module(x, tuple(hx))[0], [x, *hx], seeds, is_grads_batched=True, create_graph=graph
            )
            for module in (ours, stock)
        )
        assert_same(got, want, torch.float64)
        assert all(t.requires_grad is graph for t in got)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("rows", [1, 5, 40])
def test_large_steps_with_gradients_are_those_of_nn_lstm_cell(rows, dtype):
    stock, ours = nn.LSTMCell(60, 131, dtype=dtype), fastlstm.LSTMCell(60, 131, dtype=dtype)
    ours.load_state_dict(stock.state_dict())
    leaves = [torch.randn(3, rows, 60, dtype=dtype), *torch.randn(2, rows, 131, dtype=dtype)]

    def run(module, x, *hx):
        for step in x:
            hx = module(step, hx)
        return hx

    assert_same(
        values_and_gradients(ours, run, leaves), values_and_gradients(stock, run, leaves), dtype
    )


def test_one_row_of_a_large_cell_is_as_the_stock_one():
    stock, ours = nn.LSTMCell(512, 512), fastlstm.LSTMCell(512, 512)
    ours.load_state_dict(stock.state_dict())
    x = torch.randn(1, 512)
    with torch.no_grad():
        assert_same(flat(ours(x)), flat(stock(x)), x.dtype)


def test_traces_and_autocast_have_torchs_own_step():
    """A trace records no operator of ours; under autocast the dtype is torch's at any size."""
    cell, x = fastlstm.LSTMCell(300, 300), torch.randn(3, 300)
    with torch.no_grad():
        traced = torch.jit.trace(cell, (x,))
        assert "fastlstm_C" not in str(traced.inlined_graph)
        with torch.autocast("cpu", torch.bfloat16):
            assert [h.dtype for h in cell(x)] == [h.dtype for h in cell(x[:1])]


def test_without_the_library_all_steps_are_torchs_own(monkeypatch):
    seen = []
    real = torch._VF.lstm_cell
    monkeypatch.setattr(torch._VF, "lstm_cell", lambda *a: seen.append(a) or real(*a))
    gone = dataclasses.replace(backends._TABLE["cpu"], missing=lambda: "no C++ compiler")
    monkeypatch.setattr(backends, "_AUTOMATIC", (gone, *backends._AUTOMATIC[1:]))
    with torch.no_grad():
        fastlstm.LSTMCell(IN, H)(torch.randn(B, IN), (torch.randn(B, H), torch.randn(B, H)))
    assert len(seen) == 1


@pytest.mark.parametrize(
    "hx", [[torch.zeros(B, H)] * 2, (torch.zeros(B, H),), torch.zeros(2, B, H)]
)
def test_states_of_other_forms_fare_as_with_nn_lstm_cell(hx):
    """What is no tuple of two is left to torch: its result, or its error."""
    stock, ours = make_pair(torch.float32)
    x = torch.randn(B, IN)
    try:
        want = stock(x, hx)
    except Exception as error:
        with pytest.raises(type(error)):
            ours(x, hx)
    else:
        assert_same(flat(ours(x, hx)), flat(want), x.dtype)


@pytest.mark.parametrize("bias", [True, False])
def test_parameters_are_those_of_nn_lstm_cell(bias):
    torch.manual_seed(7)
    stock = nn.LSTMCell(IN, H, bias)
    torch.manual_seed(7)
    ours = fastlstm.LSTMCell(IN, H, bias)
    assert [n for n, _ in ours.named_parameters()] == [n for n, _ in stock.named_parameters()]
    for a, e in zip(ours.parameters(), stock.parameters(), strict=True):
        assert torch.equal(a, e)  # initialised alike under the same seed
    stock.load_state_dict(ours.state_dict())
    assert repr(ours) == repr(stock)
    assert isinstance(ours, nn.LSTMCell)
    arguments = (IN, H, bias, "cpu", torch.float64)
    assert repr(fastlstm.LSTMCell(*arguments)) == repr(nn.LSTMCell(*arguments))


def test_copies_and_repr():
    ours = fastlstm.LSTMCell(IN, H, backend="reference")
    assert repr(ours) == f"LSTMCell({IN}, {H}, backend='reference')"
    x = torch.randn(B, IN)
    for copied in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert type(copied) is fastlstm.LSTMCell
        assert copied.backend == "reference"
        assert_same(flat(copied(x)), flat(ours(x)), x.dtype)
    with pytest.raises(ValueError, match=r"backend.*'nonesuch'"):
        fastlstm.LSTMCell(IN, H, backend="nonesuch")


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_replaced_weights_take_effect(backend):
    stock, ours = make_pair(backend=backend)
    for module in (stock, ours):
        parametrizations.weight_norm(module, "weight_hh")
        with torch.no_grad():
            module.parametrizations.weight_hh.original0.mul_(2)
    leaves = [torch.randn(B, n, dtype=torch.float64) for n in (IN, H, H)]

    def run(module, x, h, c):
        return module(x, (h, c))

    assert_same(
        values_and_gradients(ours, run, leaves),
        values_and_gradients(stock, run, leaves),
        torch.float64,
    )


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_states_may_be_changed_in_place(backend):
    """What is returned is not what is kept for the backward pass."""
    stock, ours = make_pair(backend=backend)

    def run(module, x):
        h, c = module(x)
        h, c = module(x, (h.mul_(2), c.add_(1)))
        return h.sub_(1), c

    leaves = [torch.randn(B, IN, dtype=torch.float64)]
    assert_same(
        values_and_gradients(ours, run, leaves),
        values_and_gradients(stock, run, leaves),
        torch.float64,
    )


X, HX = torch.zeros(B, IN), torch.zeros(B, H)
REFUSED: dict[str, tuple[Any, Any, str]] = {
    "rank_0": (X[0, 0], None, "input to be 1D or 2D, got 0D"),
    "rank_3": (X[None], None, "input to be 1D or 2D, got 3D"),
    "features": (X[:, 1:], None, r"input\.size\(-1\).*Expected 4, got 3"),
    "dtype": (X.double(), None, r"input dtype \(torch.float64\).*weight dtype \(torch.float32\)"),
    "device": (X.to("meta"), None, "Input and parameter tensors.*meta.*cpu"),
    "hx_rank": (X, (HX[None], HX), r"hx\[0\] to be 1D or 2D, got 3D"),
    "hx_batch": (X, (HX[:1], HX), r"hx\[0\].*\(3, 6\).*batched.*\(1, 6\)"),
    "cx_features": (X, (HX, HX[:, :2]), r"hx\[1\].*\(3, 6\).*\(3, 2\)"),
    "hx_unbatched": (X[0], (HX, HX), r"hx\[0\].*\(6,\).*unbatched.*\(3, 6\)"),
    "hx_dtype": (X, (HX.double(), HX), r"hx\[0\].*float32.*float64"),
    "hx_device": (X, (HX.to("meta"), HX), r"hidden tensor hx\[0\] at meta"),
    "one_state": (X, (HX,), "hx.*two hidden states.*got 1"),
    "tensor": (X, HX, "hx: .*got Tensor"),
}


@pytest.mark.parametrize(("input", "hx", "message"), REFUSED.values(), ids=REFUSED)
def test_wrong_arguments_raise_as_nn_lstm_cell(input, hx, message):
    with pytest.raises((RuntimeError, ValueError, TypeError)) as expected:
        nn.LSTMCell(IN, H)(input, hx)
    with pytest.raises(expected.type, match=message):
        fastlstm.LSTMCell(IN, H, backend="cpu")(input, hx)


def test_compiles_with_every_batch_size():
    for backend in ("auto", "cpu"):
        cell = fastlstm.LSTMCell(IN, H, backend=backend)
        compiled = torch.compile(cell, fullgraph=True, dynamic=True, backend="aot_eager")
        for batch in (2, 5):
            x = torch.randn(batch, IN)
            assert_same(
                values_and_gradients(cell, lambda _, t, run=compiled: run(t), [x]),
                values_and_gradients(cell, lambda _, t, run=cell: run(t), [x]),
                x.dtype,
            )


def test_a_call_of_one_step_costs_less_than_nn_lstms():
    """T=1, B=1, H=128, paired and in turn; about 0.4 and 0.6 of nn.LSTM's time."""
    stock, ours = nn.LSTM(128, 128), fastlstm.LSTM(128, 128)
    x, hx = torch.randn(1, 1, 128), (torch.zeros(1, 1, 128), torch.zeros(1, 1, 128))

    def seconds(module) -> float:
        start = time.perf_counter()
        for _ in range(50):
            module(x, hx)
        return time.perf_counter() - start

    for grad in (False, True):
        with torch.set_grad_enabled(grad), settings.threads(1):
            pairs = [(seconds(ours), seconds(stock)) for _ in range(21)]
        assert statistics.median(a / b for a, b in pairs) < 0.9

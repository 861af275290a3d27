"""Swapping nn.LSTM in models and in torch itself."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize

import fastlstm
import fastlstm.compat
from cases import tolerance

STOCK, STOCK_CELL = nn.LSTM, nn.LSTMCell
LEAVES = {False: fastlstm.LSTM, True: fastlstm.compat.LSTM}
T, B, IN, H = 4, 2, 3, 5


class Tagger(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.ModuleList([nn.LSTM(IN, H, bidirectional=True), nn.LSTM(2 * H, H, 2)])
        self.head = nn.Linear(H, 2)

    def forward(self, x):
        for layer in self.encoder:
            x = layer(x)[0]
        return self.head(x)


class Custom(nn.LSTM):
    def forward(self, input, hx=None):
        return super().forward(2 * input, hx)


@pytest.mark.parametrize("compat", [False, True])
def test_replace_keeps_parameters_and_training(compat):
    stock, x = Tagger(), torch.randn(T, B, IN)
    ours = copy.deepcopy(stock)
    optimizers = [torch.optim.Adam(m.parameters(), lr=0.01) for m in (stock, ours)]
    before = list(ours.parameters())
    report = fastlstm.replace_lstm_(ours, compat=compat)
    assert report.replaced == ["encoder.0", "encoder.1"]
    assert report.skipped == {}
    assert all(type(m) is LEAVES[compat] for m in ours.encoder)
    assert all(a is b for a, b in zip(ours.parameters(), before, strict=True))
    for _ in range(3):
        losses = [m(x).square().mean() for m in (stock, ours)]
        torch.testing.assert_close(losses[1], losses[0], **tolerance(x.dtype))
        for loss, optimizer in zip(losses, optimizers, strict=True):
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    for a, b in zip(ours.parameters(), stock.parameters(), strict=True):
        torch.testing.assert_close(a, b, **tolerance(x.dtype))
    stock.load_state_dict(ours.state_dict())


@pytest.mark.parametrize("compat", [False, True])
def test_restore_is_the_inverse(compat):
    model = Tagger()
    expected = list(vars(model.encoder[0]))
    fastlstm.replace_lstm_(model, compat=compat, backend="reference")
    report = fastlstm.restore_lstm_(model)
    assert report.replaced == ["encoder.0", "encoder.1"]
    assert all(type(m) is nn.LSTM for m in model.encoder)
    assert list(vars(model.encoder[0])) == expected
    assert list(fastlstm.restore_lstm_(model).skipped) == ["encoder.0", "encoder.1"]


def test_cells_are_replaced_and_restored():
    stock = nn.ModuleDict({"cell": nn.LSTMCell(IN, H), "own": type("C", (nn.LSTMCell,), {})(IN, H)})
    parametrizations.weight_norm(stock["cell"], "weight_hh")
    ours, x = copy.deepcopy(stock), torch.randn(B, IN)
    report = fastlstm.replace_lstm_(ours, backend="cpu")
    assert report.replaced == ["cell"]
    assert "subclass" in report.skipped["own"]
    assert isinstance(ours["cell"], fastlstm.LSTMCell)
    assert ours["cell"].backend == "cpu"
    for a, b in zip(ours["cell"](x), stock["cell"](x), strict=True):
        torch.testing.assert_close(a, b, **tolerance(x.dtype))
    assert fastlstm.restore_lstm_(ours).replaced == ["cell"]
    assert not isinstance(ours["cell"], fastlstm.LSTMCell)
    assert "backend" not in vars(ours["cell"])


def test_the_model_itself_is_replaced():
    model = nn.LSTM(IN, H)
    report = fastlstm.replace_lstm_(model, backend="reference")
    assert type(model) is fastlstm.LSTM
    assert model.backend == "reference"
    assert report.replaced == [""]
    assert "(the model itself)" in str(report)


def test_a_shared_module_is_replaced_once():
    lstm = nn.LSTM(IN, IN)
    assert fastlstm.replace_lstm_(nn.Sequential(lstm, lstm)).replaced == ["0"]


def test_filter_sees_module_and_name():
    model, seen = Tagger(), []

    def second_only(module, name):
        seen.append((module, name))
        return name.endswith("1")

    report = fastlstm.replace_lstm_(model, second_only)
    assert report.replaced == ["encoder.1"]
    assert report.skipped == {"encoder.0": "left out by filter_fn"}
    assert seen == [(model.encoder[0], "encoder.0"), (model.encoder[1], "encoder.1")]
    assert str(report).splitlines() == [
        "replaced 1, skipped 1",
        "  replaced encoder.1",
        "  skipped encoder.0: left out by filter_fn",
    ]


def test_what_cannot_be_replaced_is_reported():
    wrapped = nn.LSTM(IN, H)
    wrapped.forward = wrapped.forward  # as hooks of other libraries do
    model = nn.ModuleDict(
        {
            "subclass": Custom(IN, H),
            "wrapped": wrapped,
            "scripted": torch.jit.script(nn.LSTM(IN, H)),
            "ours": fastlstm.LSTM(IN, H),
            "compat": fastlstm.compat.LSTM(IN, H),
            "other": type("LSTM", (nn.Module,), {})(),
            "gru": nn.GRU(IN, H),
        }
    )
    classes = {name: type(m) for name, m in model.items()}
    report = fastlstm.replace_lstm_(model)
    assert report.replaced == []
    assert list(report.skipped) == ["subclass", "wrapped", "scripted", "ours", "compat", "other"]
    for name, reason in {
        "subclass": "Custom is a subclass",
        "wrapped": "forward was replaced",
        "scripted": "scripted",
        "ours": "already",
        "compat": "already",
        "other": "another class",
    }.items():
        assert reason in report.skipped[name]
    assert {name: type(m) for name, m in model.items()} == classes


def test_quantized_modules_are_reported():
    quantized = pytest.importorskip("torch.ao.nn.quantized.dynamic")
    report = fastlstm.replace_lstm_(nn.Sequential(quantized.LSTM(IN, H)))
    assert "torch.ao.nn" in report.skipped["0"]


@pytest.mark.parametrize("compat", [False, True])
def test_parametrized_modules_are_replaced(compat):
    stock = nn.LSTM(IN, H)
    parametrizations.weight_norm(stock, "weight_hh_l0")
    ours, x = copy.deepcopy(stock), torch.randn(T, B, IN)
    assert fastlstm.replace_lstm_(ours, compat=compat).replaced == [""]
    for module in (stock, ours):
        with torch.no_grad():
            module.parametrizations.weight_hh_l0.original0.mul_(2)
    assert isinstance(ours, LEAVES[compat])
    assert type(ours).__name__ == "ParametrizedLSTM"
    torch.testing.assert_close(ours(x), stock(x))
    torch.testing.assert_close(copy.deepcopy(ours)(x), stock(x))
    assert type(stock).__bases__ == (STOCK,)
    parametrize.remove_parametrizations(ours, "weight_hh_l0")
    assert type(ours) is LEAVES[compat]
    torch.testing.assert_close(ours(x), stock(x))


def test_a_parametrized_module_is_restored():
    model = nn.LSTM(IN, H)
    parametrizations.weight_norm(model, "weight_hh_l0")
    fastlstm.replace_lstm_(model)
    assert fastlstm.restore_lstm_(model).replaced == [""]
    assert type(model).__bases__ == (STOCK,)


def test_hooks_stay():
    model, calls = nn.LSTM(IN, H), []
    model.register_forward_hook(lambda *arguments: calls.append(arguments))
    fastlstm.replace_lstm_(model)
    model(torch.randn(T, B, IN))
    assert len(calls) == 1


def test_wrong_arguments():
    with pytest.raises(TypeError, match=r"model: expected a torch\.nn\.Module, got list"):
        fastlstm.replace_lstm_([nn.LSTM(IN, H)])
    model = Tagger()
    for backend in ("nonesuch", None, ["cpu"]):
        with pytest.raises(ValueError, match="backend: got "):
            fastlstm.replace_lstm_(model, backend=backend)
    with pytest.raises(TypeError, match="filter_fn: expected a callable, got bool"):
        fastlstm.replace_lstm_(model, True)
    assert type(model.encoder[0]) is nn.LSTM


def test_a_filter_that_raises_leaves_the_model_as_it_was():
    model = Tagger()

    def fails(module, name):
        return {"encoder.0": True}[name]

    with pytest.raises(KeyError, match=r"encoder\.1"):
        fastlstm.replace_lstm_(model, fails, backend="reference")
    assert [type(m) for m in model.encoder] == [nn.LSTM, nn.LSTM]


def places() -> set[type]:
    return {torch.nn.LSTM, torch.nn.modules.LSTM, torch.nn.modules.rnn.LSTM}


def cell_places() -> set[type]:
    return {torch.nn.LSTMCell, torch.nn.modules.LSTMCell, torch.nn.modules.rnn.LSTMCell}


@pytest.fixture(autouse=True)
def _unpatched():
    yield
    assert places() == {STOCK}
    assert cell_places() == {STOCK_CELL}


@pytest.mark.parametrize("compat", [False, True])
def test_patch_as_a_context_manager(compat):
    with fastlstm.patch(compat=compat):
        assert places() == {LEAVES[compat]}
        assert cell_places() == {fastlstm.LSTMCell}
        assert repr(nn.LSTMCell(IN, H)) == repr(STOCK_CELL(IN, H))
        model = Tagger()
        assert isinstance(model.encoder[0], nn.LSTM)
        derived = type("Derived", (nn.LSTM,), {})(IN, H)
    assert places() == {STOCK}
    assert all(type(m) is LEAVES[compat] for m in model.encoder)
    assert isinstance(model.encoder[0], STOCK) is compat
    assert model(torch.randn(T, B, IN)).shape == (T, B, 2)
    assert isinstance(derived, LEAVES[compat])


def test_patch_as_a_call():
    handle = fastlstm.patch()
    try:
        assert places() == {fastlstm.LSTM}
    finally:
        handle.undo()
    handle.undo()  # again is no error
    assert places() == {STOCK}
    with pytest.raises(RuntimeError, match="this patch was undone"), handle:
        pass


def test_patch_ends_when_its_block_raises():
    with pytest.raises(KeyError), fastlstm.patch():
        raise KeyError


def test_patches_nest():
    with fastlstm.patch():
        with fastlstm.patch(compat=True), fastlstm.patch():
            assert places() == {fastlstm.LSTM}
        assert places() == {fastlstm.LSTM}
    assert places() == {STOCK}


def test_patches_end_in_any_order():
    first, second = fastlstm.patch(), fastlstm.patch(compat=True)
    first.undo()
    assert places() == {fastlstm.compat.LSTM}
    second.undo()
    assert places() == {STOCK}


def test_replace_and_restore_mean_torchs_own_class_under_a_patch():
    model = Tagger()
    with fastlstm.patch():
        assert len(fastlstm.replace_lstm_(model, compat=True).replaced) == 2
        assert isinstance(model.encoder[0], STOCK)
        fastlstm.restore_lstm_(model)
    assert type(model.encoder[0]) is STOCK


def test_stock_modules_unpickled_under_a_patch_become_ours():
    stock, x = nn.LSTM(IN, H, 2), torch.randn(T, B, IN)
    buffer = io.BytesIO()
    torch.save(stock, buffer)
    buffer.seek(0)
    with fastlstm.patch():
        ours = torch.load(buffer, weights_only=False)
    assert type(ours) is fastlstm.LSTM
    assert ours.backend == "auto"
    torch.testing.assert_close(ours(x), stock(x))
    assert type(pickle.loads(pickle.dumps(ours))) is fastlstm.LSTM

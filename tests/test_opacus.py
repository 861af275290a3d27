"""Opacus: per-sample gradients of fastlstm's modules, right or refused."""

from __future__ import annotations

import warnings

import pytest
import torch
from opacus import PrivacyEngine
from opacus.grad_sample import GradSampleModule
from opacus.validators import ModuleValidator
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import fastlstm
import fastlstm.compat
import fastlstm.opacus
from cases import tolerance

T, B, IN, H = 5, 4, 3, 6
pytestmark = pytest.mark.filterwarnings("ignore")  # opacus's own, of its random numbers and hooks


class Model(nn.Module):
    def __init__(self, leaf: type[nn.RNNBase] = fastlstm.LSTM, **config) -> None:
        super().__init__()
        self.lstm = leaf(IN, H, **config)
        self.head = nn.Linear(H * (1 + self.lstm.bidirectional), 1)

    def forward(self, x):
        return self.head(self.lstm(x)[0]).tanh().sum(2)


@pytest.mark.parametrize(
    ("leaf", "batch_first", "reduction"),
    [(fastlstm.LSTM, True, "mean"), (fastlstm.compat.LSTM, False, "sum")],
)
def test_per_sample_gradients_are_those_of_each_sample(leaf, batch_first, reduction) -> None:
    model = Model(leaf, num_layers=2, bidirectional=True, batch_first=batch_first)
    model.lstm.weight_hh_l0.requires_grad_(False)
    x = torch.randn(B, T, IN)
    alone = []
    for one in x.unsqueeze(1):  # (1, T, I)
        loss = model(one if batch_first else one.transpose(0, 1)).square().sum()
        wanted = [p for p in model.parameters() if p.requires_grad]
        alone.append(torch.autograd.grad(loss, wanted))
    watched = GradSampleModule(model, batch_first=batch_first, loss_reduction=reduction)
    losses = watched(x if batch_first else x.transpose(0, 1)).square().sum(1 if batch_first else 0)
    (losses.mean() if reduction == "mean" else losses.sum()).backward()
    for k, parameter in enumerate(p for p in model.parameters() if p.requires_grad):
        expected = torch.stack([gradients[k] for gradients in alone])
        torch.testing.assert_close(parameter.grad_sample, expected, **tolerance(x.dtype))


def test_private_training_of_a_replaced_model() -> None:
    model = Model(nn.LSTM, batch_first=True)
    assert len(ModuleValidator.validate(model)) == 1
    fastlstm.replace_lstm_(model)
    assert ModuleValidator.validate(model) == []
    before = [p.detach().clone() for p in model.parameters()]
    data = DataLoader(TensorDataset(torch.randn(16, T, IN)), batch_size=4)
    private, optimizer, loader = PrivacyEngine().make_private(
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        data_loader=data,
        noise_multiplier=1.0,
        max_grad_norm=1.0,
    )
    for (x,) in loader:
        optimizer.zero_grad()
        private(x).square().mean().backward()
        optimizer.step()
    assert not any(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


@pytest.mark.parametrize(
    "options",
    [
        {"hx": (torch.zeros(1, B, H), torch.zeros(1, B, H))},
        {"lengths": [T, 1, 2, 3]},
        {"reset": torch.zeros(B, T, dtype=torch.bool)},
        {"return_cells": True},
    ],
    ids=lambda options: next(iter(options)),
)
def test_what_opacus_does_not_see_is_refused(options) -> None:
    watched = GradSampleModule(fastlstm.LSTM(IN, H, batch_first=True))
    with pytest.raises(RuntimeError, match="opacus sees a module's first argument alone"):
        watched(torch.randn(B, T, IN), **options)


@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("layers", [1, 2])
def test_gradients_through_final_states_are_refused(which: int, layers: int) -> None:
    watched = GradSampleModule(fastlstm.LSTM(IN, H, layers, batch_first=True))
    watched(torch.randn(B, T, IN))[0].sum().backward()  # this one is none
    output, states = watched(torch.randn(B, T, IN))
    with pytest.raises(RuntimeError, match="take the last step of output instead"):
        (output.sum() + states[which].sum()).backward()


def test_a_model_of_another_layout_is_refused() -> None:
    watched = GradSampleModule(fastlstm.LSTM(IN, H), batch_first=True)
    with pytest.raises(RuntimeError, match="batch_first: got False, expected True"):
        watched(torch.randn(T, B, IN))


def test_dropout_is_refused() -> None:
    lstm = fastlstm.LSTM(IN, H, 2, batch_first=True, dropout=0.5)
    (error,) = ModuleValidator.validate(lstm)
    assert "dropout: opacus runs a layer again" in str(error)
    with pytest.raises(RuntimeError, match="dropout: opacus runs a layer again"):
        GradSampleModule(lstm)(torch.randn(B, T, IN))


def test_hooks_of_others_change_nothing() -> None:
    lstm, seen = fastlstm.LSTM(IN, H), []
    lstm.register_forward_hook(lambda *args: seen.append(args))
    with warnings.catch_warnings(action="error"):
        _, (h_n, _) = lstm(torch.randn(T, B, IN), lengths=[T, 1, 2, 3])
        h_n.sum().backward()
    assert len(seen) == 1

"""Random modules and inputs against nn.LSTM: outputs, states and every gradient.

The seed is new in every run and printed in the test's name; ``FASTLSTM_SEED=n`` runs the
cases of an earlier one again.
"""

from __future__ import annotations

import os
import random

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import fastlstm
from cases import tolerance

SEED = int(os.environ["FASTLSTM_SEED"])  # conftest.py chooses one where none is given
CASES = 60


def random_case(choose: random.Random) -> dict:
    hidden = choose.choice([1, 2, 7, 16, 31, 33, 64, 100, 129])
    return dict(
        input_size=choose.choice([1, 3, 16, 17, 40, 65]),
        hidden_size=hidden,
        num_layers=choose.choice([1, 1, 2, 3]),
        bias=choose.random() < 0.8,
        batch_first=choose.random() < 0.5,
        bidirectional=choose.random() < 0.5,
        proj_size=choose.randrange(1, hidden) if hidden > 1 and choose.random() < 0.3 else 0,
        dtype=choose.choice([torch.float32, torch.float64]),
    )


def run(module: nn.Module, x: Tensor, hx, lengths: list[int] | None) -> list[Tensor]:
    """Outputs, then the gradients of inputs, states and parameters, on a fixed scale."""
    leaves = [t.detach().clone().requires_grad_() for t in (x, *(hx or ()))]
    given = leaves[0]
    if lengths is not None:
        given = pack_padded_sequence(given, lengths, module.batch_first, enforce_sorted=False)
    out, (h, c) = module(given, tuple(leaves[1:]) or None)
    if lengths is not None:
        out = pad_packed_sequence(out, module.batch_first)[0]
    torch.manual_seed(0)
    loss = sum((t * torch.randn_like(t)).sum() for t in (out, h, c)) / out.numel() ** 0.5
    gradients = torch.autograd.grad(loss, [*leaves, *module.parameters()])
    return [out, h, c, *gradients]


@pytest.mark.parametrize("index", range(CASES), ids=lambda k: f"seed{SEED}-{k}")
def test_random_module_equals_nn_lstm(index: int) -> None:
    choose = random.Random(SEED * 1000 + index)
    torch.manual_seed(SEED * 1000 + index)
    case = random_case(choose)
    stock = nn.LSTM(**case)
    ours = fastlstm.LSTM(**case, backend="cpu")
    ours.load_state_dict(stock.state_dict())
    steps, batch = choose.choice([1, 2, 9, 30]), choose.choice([1, 2, 5, 6, 13, 14, 15, 40])
    lead = (batch, steps) if case["batch_first"] else (steps, batch)
    x = torch.randn(*lead, case["input_size"], dtype=case["dtype"])
    hx = None
    if choose.random() < 0.5:
        states = case["num_layers"] * (2 if case["bidirectional"] else 1)
        sizes = (case["proj_size"] or case["hidden_size"], case["hidden_size"])
        hx = tuple(torch.randn(states, batch, size, dtype=case["dtype"]) for size in sizes)
    lengths = None
    if choose.random() < 0.4:
        lengths = [choose.randint(1, steps) for _ in range(batch)]
    for a, b in zip(run(ours, x, hx, lengths), run(stock, x, hx, lengths), strict=True):
        torch.testing.assert_close(a, b, **tolerance(case["dtype"]), msg=lambda m: f"{case}: {m}")

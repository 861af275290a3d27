"""Jagged nested tensors: each sequence alone, in and out."""

from __future__ import annotations

import pytest
import torch
from test_module import CONFIGS, IN, B, H, assert_same, flat, make_pair, make_state
from torch import Tensor

import fastlstm

LENGTHS = [2, 5, 4]


def jagged(parts: list[Tensor]) -> Tensor:
    return torch.nested.nested_tensor(parts, layout=torch.jagged)


def parts_of(lengths: list[int] = LENGTHS) -> list[Tensor]:
    return [torch.randn(n, IN, dtype=torch.float64) for n in lengths]


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_nested_is_each_sequence_alone(config, batch_first):
    stock, ours = make_pair(batch_first=batch_first, **config)
    parts, (h0, c0) = parts_of(), make_state(stock)
    x = jagged(parts).requires_grad_()
    output, (h_n, c_n), cells = ours(x, (h0, c0), return_cells=True)
    assert output.is_nested and output.layout == cells.layout == torch.jagged
    assert output.shape[1] == x.shape[1]  # the same ragged dimension: they can be added
    leaves = [t.clone().requires_grad_() for t in parts]
    alone = [stock(t, (h0[:, b], c0[:, b])) for b, t in enumerate(leaves)]
    assert_same(list(output.unbind()), [y for y, _ in alone], x.dtype)
    assert_same([h_n], [torch.stack([s[0] for _, s in alone], 1)], x.dtype)
    assert_same([c_n], [torch.stack([s[1] for _, s in alone], 1)], x.dtype)
    (output.values().square().sum() + c_n.sum()).backward()
    sum(y.square().sum() + s[1].sum() for y, s in alone).backward()
    assert_same(list(x.grad.unbind()), [t.grad for t in leaves], x.dtype)
    assert_same([p.grad for p in ours.parameters()], [p.grad for p in stock.parameters()], x.dtype)


def test_reset_and_checkpoint_and_empty_sequences():
    lengths = [2, 0, 4]
    parts, marks = parts_of(lengths), [torch.rand(n) < 0.5 for n in lengths]
    ours = fastlstm.LSTM(IN, H, bidirectional=True, dtype=torch.float64, checkpoint=True)
    padded = torch.nn.utils.rnn.pad_sequence(parts)
    want, state = ours(
        padded, reset=torch.nn.utils.rnn.pad_sequence(marks), lengths=torch.tensor(lengths)
    )
    got, got_state = ours(jagged(parts), reset=jagged(marks))
    assert_same(list(got.unbind()), [want[:n, b] for b, n in enumerate(lengths)], want.dtype)
    assert_same(flat(got_state), flat(state), want.dtype)


def test_rows_between_sequences_are_not_read():
    x = torch.randn(2, 6, IN)
    x[0, 3:], x[1, :1] = float("nan"), float("nan")
    holes = torch.nested.narrow(
        x, 1, torch.tensor([0, 1]), torch.tensor([3, 2]), layout=torch.jagged
    )
    ours = fastlstm.LSTM(IN, H)
    got, _ = ours(holes)
    want, _ = ours(jagged([x[0, :3], x[1, 1:3]]))
    assert_same(list(got.unbind()), list(want.unbind()), x.dtype)


NESTED = jagged([torch.zeros(n, IN) for n in LENGTHS])
WRONG = {
    "strided": (torch.nested.nested_tensor([torch.zeros(2, IN)]), {}, TypeError, "torch.jagged"),
    "transposed": (NESTED.transpose(1, 2), {}, ValueError, "second dimension"),
    "features": (jagged([torch.zeros(2, IN + 1)]), {}, RuntimeError, "Expected 4, got 5"),
    "dtype": (NESTED.double(), {}, ValueError, "float64.*float32"),
    "lengths": (NESTED, {"lengths": LENGTHS}, ValueError, "lengths: .*nested"),
    "hx": (NESTED, {"hx": (torch.zeros(1, 1, H),) * 2}, RuntimeError, r"hx\[0\]"),
    "reset": (NESTED, {"reset": torch.zeros(B, 5).bool()}, TypeError, "reset: .*nested"),
    "reset_lengths": (
        NESTED,
        {"reset": jagged([torch.zeros(n).bool() for n in (5, 2, 4)])},
        ValueError,
        "reset: .*lengths",
    ),
}


@pytest.mark.parametrize(("input", "arguments", "error", "message"), WRONG.values(), ids=WRONG)
def test_wrong_arguments(input, arguments, error, message):
    with pytest.raises(error, match=message):
        fastlstm.LSTM(IN, H)(input, **arguments)

"""The arguments nn.LSTM lacks: lengths, reset, return_cells."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from test_module import (
    CONFIGS,
    IN,
    B,
    H,
    T,
    assert_same,
    flat,
    make_pair,
    make_state,
    values_and_gradients,
)
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

import fastlstm
from cases import tolerance

# torch's own LSTM, the "aten" backend, has lengths but neither resets nor cells.
BACKENDS = ["reference", "cpu"]
DTYPES = [torch.float32, torch.float64]
configs = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "float64"])


def one_by_one(stock: nn.LSTM, x: Tensor, h0: Tensor, c0: Tensor, lengths: list[int]):
    """What ``lengths`` means: each sequence through ``stock`` alone.  x (T, B, IN)."""
    features = (stock.proj_size or H) * (2 if stock.bidirectional else 1)
    outputs, states = [], []
    for b, length in enumerate(lengths):
        output, state = x.new_zeros(0, features), (h0[:, b], c0[:, b])
        if length:
            output, state = stock(x[:length, b], state)
        outputs.append(torch.cat((output, x.new_zeros(len(x) - length, features))))
        states.append(state)
    h_n, c_n = (torch.stack(s, 1) for s in zip(*states, strict=True))
    return torch.stack(outputs, 1), (h_n, c_n)


@pytest.mark.parametrize("backend", [*BACKENDS, "auto"])
@dtypes
@pytest.mark.parametrize(
    "lengths", [[2, 5, 0], [5, 4, 1], [0, 3, 3], [0, 0, 0], [5, 5, 5]], ids=str
)
@configs
def test_lengths_are_each_sequence_alone(config, lengths, dtype, backend):
    stock, ours = make_pair(dtype, backend, **config)
    leaves = [torch.randn(T, B, IN, dtype=dtype), *make_state(stock)]

    def expected(module, x, h0, c0):
        return one_by_one(module, x, h0, c0, lengths)

    def actual(module, x, h0, c0):
        return module(x, (h0, c0), lengths=torch.tensor(lengths))

    assert_same(
        values_and_gradients(ours, actual, leaves),
        values_and_gradients(stock, expected, leaves),
        dtype,
    )


@pytest.mark.parametrize("return_cells", [False, True])
def test_lengths_batch_first_is_the_transpose(return_cells):
    _, ours = make_pair(num_layers=2, bidirectional=True)
    lengths = torch.tensor([2, 5, 0])
    x, reset = torch.randn(T, B, IN, dtype=torch.float64), torch.rand(T, B) < 0.4
    arguments = {"lengths": lengths, "return_cells": return_cells}
    expected = ours(x, reset=reset, **arguments)
    ours.batch_first = True
    actual = ours(x.transpose(0, 1), reset=reset.t(), **arguments)
    assert_same(flat(actual[1]), flat(expected[1]), x.dtype)
    for a, e in zip(flat(actual[::2]), flat(expected[::2]), strict=True):
        torch.testing.assert_close(a.transpose(0, 1), e)


def test_lengths_may_be_a_list_or_of_any_integer_dtype():
    _, ours = make_pair()
    x = torch.randn(T, B, IN, dtype=torch.float64)
    expected = flat(ours(x, lengths=torch.tensor([2, 5, 0])))
    for lengths in ([2, 5, 0], torch.tensor([2, 5, 0], dtype=torch.uint8)):
        assert_same(flat(ours(x, lengths=lengths)), expected, x.dtype)


@pytest.mark.parametrize("lengths", [[], torch.zeros(0, dtype=torch.int64)], ids=["list", "tensor"])
def test_lengths_of_an_empty_batch(lengths):
    output, (h_n, _) = fastlstm.LSTM(IN, H)(torch.zeros(T, 0, IN), lengths=lengths)
    assert output.shape == (T, 0, H)
    assert h_n.shape == (1, 0, H)


def test_padding_is_not_read():
    ours = fastlstm.LSTM(IN, H, bidirectional=True)
    x = torch.randn(T, B, IN)
    x[2:, 0], x[4:, 1] = float("nan"), float("inf")
    x.requires_grad_()
    output, state, cells = ours(x, lengths=[2, 4, 5], return_cells=True)
    sum(t.sum() for t in (output, *state, cells)).backward()
    for tensor in (output, *state, cells, x.grad, ours.weight_ih_l0.grad):
        assert tensor.isfinite().all()
    assert not output[2:, 0].any()
    assert not cells[4:, 1].any()
    assert not x.grad[2:, 0].any()


def segmented(stock: nn.LSTM, x: Tensor, h0: Tensor, c0: Tensor, reset: Tensor):
    """What ``reset`` means, for one sequence x (T, IN), h0 (L*D, P), reset (T,): each
    segment through ``stock`` alone, layer by layer all at once."""
    directions = 2 if stock.bidirectional else 1
    starts = sorted({0, *reset.nonzero().flatten().tolist()})
    ends = [*starts[1:], len(x)]
    outputs, finals = [], []
    for start, end in zip(starts, ends, strict=True):
        state = [torch.zeros_like(h0), torch.zeros_like(c0)]
        for k, given in enumerate((h0, c0)):
            if start == 0 and not reset[0]:  # the forward directions' initial state
                state[k][0::directions] = given[0::directions]
            if end == len(x) and directions == 2:  # the reverse directions'
                state[k][1::2] = given[1::2]
        output, final = stock(x[start:end], tuple(state))
        outputs.append(output)
        finals.append(final)
    last_first = [
        torch.stack([finals[0 if row % directions else -1][k][row] for row in range(len(h0))])
        for k in range(2)
    ]
    return torch.cat(outputs), tuple(last_first)


RESETS = {
    "inside": [[0, 0, 0], [0, 1, 0], [1, 0, 0], [0, 1, 0], [0, 0, 0]],
    "first_and_last": [[1, 0, 1], [0, 0, 0], [0, 0, 0], [0, 0, 0], [0, 1, 1]],
    "all": [[1] * B] * T,
    "none": [[0] * B] * T,
}


@pytest.mark.parametrize("backend", BACKENDS)
@dtypes
@pytest.mark.parametrize("reset", RESETS.values(), ids=RESETS.keys())
@configs
def test_reset_is_each_segment_alone(config, reset, dtype, backend):
    stock, ours = make_pair(dtype, backend, **config)
    reset = torch.tensor(reset).bool()
    leaves = [torch.randn(T, B, IN, dtype=dtype), *make_state(stock)]

    def expected(module, x, h0, c0):
        parts = [segmented(module, x[:, b], h0[:, b], c0[:, b], reset[:, b]) for b in range(B)]
        return (
            torch.stack([y for y, _ in parts], 1),
            tuple(torch.stack([s[k] for _, s in parts], 1) for k in range(2)),
        )

    def actual(module, x, h0, c0):
        return module(x, (h0, c0), reset=reset)

    assert_same(
        values_and_gradients(ours, actual, leaves),
        values_and_gradients(stock, expected, leaves),
        dtype,
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("form", ["batch_first", "unbatched", "packed", "packed_unsorted"])
def test_reset_and_cells_in_every_form(form, backend):
    """Each form agrees with plain padded input, sequence by sequence."""
    config = {"num_layers": 2, "bidirectional": True}
    _, ours = make_pair(backend=backend, **config)
    x, reset = torch.randn(T, B, IN, dtype=torch.float64), torch.rand(T, B) < 0.4
    h0, c0 = make_state(ours)
    lengths = [5, 4, 2] if form == "packed" else [2, 5, 4] if "packed" in form else [T] * B

    def run(module, x, h0, c0):
        extra = {"return_cells": True}
        if form == "batch_first":
            module.batch_first = True
            result = module(x.transpose(0, 1), (h0, c0), reset=reset.t(), **extra)
            module.batch_first = False
            return [result[0].transpose(0, 1), result[1], result[2].transpose(0, 1)]
        if form == "unbatched":
            parts = [
                flat(module(x[:, b], (h0[:, b], c0[:, b]), reset=reset[:, b], **extra))
                for b in range(B)
            ]
            return [torch.stack(tensors, 1) for tensors in zip(*parts, strict=True)]
        packed, packed_reset = (
            pack_padded_sequence(t, lengths, enforce_sorted=form == "packed") for t in (x, reset)
        )
        output, state, cells = module(packed, (h0, c0), reset=packed_reset, **extra)
        assert isinstance(cells, PackedSequence)
        return [pad_packed_sequence(output)[0], state, pad_packed_sequence(cells)[0]]

    def expected(module, x, h0, c0):
        return module(x, (h0, c0), reset=reset, lengths=lengths, return_cells=True)

    leaves = [x, h0, c0]
    assert_same(
        values_and_gradients(ours, run, leaves),
        values_and_gradients(ours, expected, leaves),
        torch.float64,
    )


def cell_loop(stock: nn.LSTM, x: Tensor, h: Tensor, c: Tensor):
    """One layer, one direction, by the equations.  x (T, B, IN), h (1, B, P), c (1, B, H)."""
    h, c, outputs, cells = h[0], c[0], [], []
    bias = stock.bias_ih_l0 + stock.bias_hh_l0 if stock.bias else 0
    for x_t in x:
        a = x_t @ stock.weight_ih_l0.T + h @ stock.weight_hh_l0.T + bias
        i, f, g, o = a.chunk(4, -1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        h = o.sigmoid() * c.tanh()
        if stock.proj_size:
            h = h @ stock.weight_hr_l0.T
        outputs.append(h)
        cells.append(c)
    return torch.stack(outputs), (h[None], c[None]), torch.stack(cells)


@pytest.mark.parametrize("backend", BACKENDS)
@dtypes
@pytest.mark.parametrize("config", [{}, {"bias": False}, {"proj_size": 2}], ids=str)
def test_cells_are_those_of_a_loop(config, dtype, backend):
    stock, ours = make_pair(dtype, backend, **config)
    leaves = [torch.randn(T, B, IN, dtype=dtype), *make_state(stock)]

    def actual(module, x, h0, c0):
        return module(x, (h0, c0), return_cells=True)

    assert_same(
        values_and_gradients(ours, actual, leaves),
        values_and_gradients(stock, cell_loop, leaves),
        dtype,
    )


def test_cells_are_the_last_layers_in_the_dtype_of_output():
    ours = fastlstm.LSTM(IN, H, 2, bidirectional=True, proj_size=2, dtype=torch.bfloat16)
    output, (_, c_n), cells = ours(torch.randn(T, B, IN).bfloat16(), return_cells=True)
    assert output.dtype == cells.dtype == torch.bfloat16
    assert cells.shape == (T, B, 2 * H)
    torch.testing.assert_close(cells[-1, :, :H], c_n[2], **tolerance(torch.bfloat16))
    torch.testing.assert_close(cells[0, :, H:], c_n[3], **tolerance(torch.bfloat16))


X = torch.zeros(T, B, IN)
RESET = torch.zeros(T, B, dtype=torch.bool)
PACKED = pack_padded_sequence(X, [5, 4, 2])
WRONG: dict[str, tuple[Any, dict[str, Any], type[Exception], str]] = {
    "negative": (X, {"lengths": [1, -2, 3]}, ValueError, r"lengths: .*0 to 5, .*-2 for sequence 1"),
    "too_long": (X, {"lengths": [1, 6, 3]}, ValueError, r"lengths: .*0 to 5, .*6 for sequence 1"),
    "count": (X, {"lengths": [1, 2]}, ValueError, r"lengths: .*\(3,\).*\(2,\)"),
    "rank": (X, {"lengths": torch.ones(B, 1).long()}, ValueError, r"lengths: .*\(3,\).*\(3, 1\)"),
    "float": (X, {"lengths": torch.ones(B)}, TypeError, "lengths: .*integer.*torch.float32"),
    "list_of_float": (X, {"lengths": [1.0, 2.0, 3.0]}, TypeError, "lengths: .*integer.*float32"),
    "bool": (X, {"lengths": torch.ones(B).bool()}, TypeError, "lengths: .*integer.*torch.bool"),
    "number": (X, {"lengths": 3}, ValueError, r"lengths: .*\(3,\).*\(\)"),
    "unbatched": (X[:, 0], {"lengths": [3]}, ValueError, "lengths: .*3-D.*2-D"),
    "packed": (PACKED, {"lengths": [5, 4, 2]}, ValueError, "lengths: .*PackedSequence"),
    "reset_shape": (X, {"reset": RESET.t()}, ValueError, r"reset: .*\(5, 3\).*\(3, 5\)"),
    "reset_rank": (X, {"reset": RESET[0]}, ValueError, r"reset: .*\(5, 3\).*\(3,\)"),
    "reset_unbatched": (X[:, 0], {"reset": RESET}, ValueError, r"reset: .*\(5,\).*\(5, 3\)"),
    "reset_dtype": (X, {"reset": RESET.float()}, TypeError, "reset: .*torch.bool.*torch.float32"),
    "reset_device": (X, {"reset": RESET.to("meta")}, ValueError, "reset: .*cpu.*meta"),
    "reset_list": (X, {"reset": [[False]]}, TypeError, "reset: .*Tensor.*list"),
    "reset_packed": (
        X, {"reset": pack_padded_sequence(RESET, [5, 4, 2])}, TypeError, "reset: .*Tensor",
    ),
    "packed_reset_padded": (PACKED, {"reset": RESET}, TypeError, "reset: .*PackedSequence.*Tensor"),
    "packed_reset_dtype": (PACKED, {"reset": PACKED}, TypeError, "reset: .*bool.*float32"),
    "packed_reset_size": (
        PACKED, {"reset": pack_padded_sequence(RESET, [5, 5, 2])}, ValueError, r"reset: .*\(11,\)",
    ),
    "packed_reset_steps": (
        PACKED, {"reset": pack_padded_sequence(RESET, [5, 3, 3])}, ValueError,
        "reset: .*packed like input",
    ),
    "packed_reset_order": (
        pack_padded_sequence(X, [5, 2, 4], enforce_sorted=False),
        {"reset": pack_padded_sequence(RESET, [2, 5, 4], enforce_sorted=False)}, ValueError,
        "reset: .*packed like input.*sorted_indices",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("input", "arguments", "error", "message"), WRONG.values(), ids=WRONG)
def test_wrong_arguments(input, arguments, error, message):
    with pytest.raises(error, match=message):
        fastlstm.LSTM(IN, H)(input, **arguments)


def test_the_new_arguments_are_keyword_only():
    with pytest.raises(TypeError):
        fastlstm.LSTM(IN, H)(X, None, [5, 4, 2])


@pytest.mark.parametrize("arguments", [{"reset": RESET}, {"return_cells": True}], ids=str)
def test_a_backend_that_cannot_says_so(arguments):
    with pytest.raises(RuntimeError, match="aten"):
        fastlstm.LSTM(IN, H, backend="aten")(X, **arguments)


@pytest.mark.parametrize("backend", BACKENDS)
def test_second_order_gradients(backend):
    ours = fastlstm.LSTM(2, 3, dtype=torch.float64, bidirectional=True, backend=backend)
    reset = torch.tensor([[0, 0, 0], [0, 1, 0], [0, 0, 0]]).bool()
    arguments = {"lengths": [1, 3, 0], "reset": reset, "return_cells": True}

    def run(x, h0, c0):
        return flat(ours(x, (h0, c0), **arguments))

    leaves = [torch.randn(3, 3, 2), torch.randn(2, 3, 3), torch.randn(2, 3, 3)]
    leaves = [t.double().requires_grad_() for t in leaves]
    assert torch.autograd.gradcheck(run, leaves, fast_mode=True)
    assert torch.autograd.gradgradcheck(run, leaves, fast_mode=True)


@pytest.mark.parametrize("lengths", ["abc", [None, 1, 2], {"a": 1}, [[1], [1, 2]], [2**70, 1, 1]])
def test_lengths_that_are_not_integers_at_all(lengths) -> None:
    with pytest.raises(TypeError, match=r"lengths: expected integers, got .*: .+"):
        fastlstm.LSTM(2, 3)(torch.randn(4, 3, 2), lengths=lengths)


def test_numpys_lengths_and_those_that_torch_refuses() -> None:
    ours, x, lengths = fastlstm.LSTM(2, 3), torch.randn(4, 3, 2), np.array([4, 2, 0])
    assert_same(flat(ours(x, lengths=lengths)), flat(ours(x, lengths=[4, 2, 0])), x.dtype)
    with pytest.raises(TypeError, match=r"lengths: .*strides"):
        ours(x, lengths=lengths[::-1])


def test_the_wrong_length_of_many_is_named() -> None:
    ours, x = fastlstm.LSTM(2, 3), torch.randn(4, 500, 2)
    for wrong in (5, -1):
        lengths = torch.full((500,), 4)
        lengths[321] = wrong
        with pytest.raises(ValueError, match=f"from 0 to 4.*got {wrong} for sequence 321") as got:
            ours(x, lengths=lengths)
        assert len(str(got.value)) < 200


def test_sparse_tensors_are_refused_by_name() -> None:
    ours, x, reset = fastlstm.LSTM(2, 3), torch.randn(4, 3, 2), torch.zeros(4, 3) > 0
    state, lengths = torch.zeros(1, 3, 3), torch.tensor([4, 2, 0])
    for name, call in {
        "input": lambda: ours(x.to_sparse()),
        r"hx\[0\]": lambda: ours(x, (state.to_sparse(), state)),
        r"hx\[1\]": lambda: ours(x, (state, state.to_sparse())),
        "lengths": lambda: ours(x, lengths=lengths.to_sparse()),
        "reset": lambda: ours(x, reset=reset.to_sparse()),
    }.items():
        with pytest.raises(TypeError, match=f"^{name}: expected a dense tensor, got .*sparse"):
            call()


def test_lengths_without_values() -> None:
    with pytest.raises(ValueError, match="lengths: expected values"):
        fastlstm.LSTM(2, 3)(
            torch.randn(4, 3, 2), lengths=torch.ones(3, dtype=torch.int64, device="meta")
        )

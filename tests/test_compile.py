"""torch.compile of a model around the LSTM: one graph for every input, every T and every B."""

from __future__ import annotations

import time

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._inductor.utils import fresh_cache

import fastlstm
from cases import tolerance

IN, H = 4, 6
# The first is traced.  To torch.compile sizes that are equal there are one, so none is another's,
# and sizes of 0 and 1 are other programs.
SIZES = ((1000, 7), (8, 5), (30, 9))


class Model(nn.Module):
    def __init__(self, **config) -> None:
        super().__init__()
        # Without biases, whose gradients are sums that inductor compiles in two ways by their size.
        self.into = nn.Linear(IN, IN, bias=False)
        self.lstm = fastlstm.LSTM(IN, H, 2, **config)
        self.head = nn.Linear(H, 3, bias=False)

    def forward(self, x: Tensor, **arguments) -> tuple[Tensor, Tensor, Tensor]:
        output, (h_n, c_n), *_ = self.lstm(self.into(x).relu(), **arguments)
        return self.head(output).tanh(), h_n, c_n


def some_lengths(steps: int, batch: int) -> Tensor:
    lengths = torch.randint(1, steps + 1, (batch,))
    lengths[-1] = 0
    return lengths


def some_state(batch: int) -> tuple[Tensor, Tensor]:
    return torch.randn(2, batch, H), torch.randn(2, batch, H)


FORMS = {
    "padded": lambda steps, batch: {},
    "lengths": lambda steps, batch: {"lengths": some_lengths(steps, batch)},
    "reset": lambda steps, batch: {"reset": torch.rand(steps, batch) < 0.3},
    "all": lambda steps, batch: {
        "lengths": some_lengths(steps, batch),
        "reset": torch.rand(steps, batch) < 0.3,
        "hx": some_state(batch),
        "return_cells": True,
    },
}


def results(model: nn.Module, x: Tensor, arguments: dict, weights: list[Tensor]) -> list[Tensor]:
    """Values and gradients; only values where nobody asks for gradients."""
    out = model(x, **arguments)
    if not torch.is_grad_enabled():
        return [*out]
    return [*out, *torch.autograd.grad(out, weights, [torch.ones_like(t) for t in out])]


@pytest.mark.parametrize("grad", [True, False], ids=["training", "inference"])
@pytest.mark.parametrize("form", FORMS)
def test_one_graph_serves_every_number_of_steps_and_sequences(form, grad):
    torch._dynamo.reset()
    model, count = Model(), CompileCounterWithBackend("inductor")
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=count)
    weights, graphs = [*model.parameters()], set()
    with torch.set_grad_enabled(grad):
        for steps, batch in SIZES:
            x, arguments = torch.randn(steps, batch, IN), FORMS[form](steps, batch)
            got = results(compiled, x, arguments, weights)
            graphs.add(count.frame_count)
            want = results(model, x, arguments, weights)
            for a, b in zip(got, want, strict=True):
                scale = b.detach().abs().max()  # gradients are sums over many steps
                torch.testing.assert_close(a / scale, b / scale, **tolerance(torch.float32))
    assert len(graphs) == 1


def test_compiling_takes_no_longer_for_more_steps():
    """Nothing is cached; about 4 s at both, the first with what torch imports for it."""

    def seconds(steps: int) -> float:
        model, x = Model(), torch.randn(steps, 2, IN)
        with fresh_cache():
            torch._dynamo.reset()
            start = time.perf_counter()
            compiled = torch.compile(model, fullgraph=True, dynamic=True)
            results(compiled, x, {}, [*model.parameters()])
            return time.perf_counter() - start

    # Each step compiled for itself would take hundreds of times as long. (Against each other: by
    # the clock alone a busy machine decides.)
    few, many = seconds(5), seconds(2000)
    assert many < 3 * few, (few, many)


def test_lengths_are_looked_at_when_the_program_runs():
    compiled = torch.compile(Model(), fullgraph=True, dynamic=True, backend="aot_eager")
    x = torch.randn(5, 3, IN)
    compiled(x, lengths=torch.tensor([1, 5, 0]))
    with pytest.raises(
        ValueError, match=r"lengths: expected values from 0 to 5.*got 6 for sequence 1"
    ):
        compiled(x, lengths=torch.tensor([1, 6, 0]))


@pytest.mark.parametrize("batch_first", [False, True])
def test_lengths_of_no_steps_and_of_all(batch_first: bool):
    model = Model(batch_first=batch_first)
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
    x = torch.randn(3, 3, IN)
    for lengths in ([1, 2, 3], [3, 3, 3], [0, 0, 0]):
        arguments = {"lengths": torch.tensor(lengths)}
        for a, b in zip(compiled(x, **arguments), model(x, **arguments), strict=True):
            torch.testing.assert_close(a, b, **tolerance(x.dtype))


def test_packing_passes_opcheck():
    for lengths in ([2, 5, 0, 3], [0, 0], [1], []):
        args = torch.tensor(lengths, dtype=torch.int64), 5
        torch.library.opcheck(torch.ops.fastlstm.packing.default, args)


@pytest.mark.parametrize("transform", ["grad", "vmap", "jvp"])
@pytest.mark.parametrize("lengths", [None, [2, 4]])
def test_transforms_inside_a_compiled_function_stay_right(transform: str, lengths) -> None:
    """They run uncompiled; with fullgraph=True torch says that it can't."""
    lstm = fastlstm.LSTM(IN, H)
    x = torch.randn(3, 4, 2, IN)

    def loss(x: Tensor) -> Tensor:
        return lstm(x, lengths=lengths)[0].sin().sum()

    programs = {
        "grad": lambda x: torch.func.grad(loss)(x[0]),
        "vmap": lambda x: torch.func.vmap(torch.func.grad(loss))(x),
        "jvp": lambda x: torch.func.jvp(loss, (x[0],), (x[1],))[1],
    }
    program = programs[transform]
    want = program(x)
    assert want.any()
    found = torch.compile(program, backend="aot_eager")(x)
    torch.testing.assert_close(found, want, **tolerance(torch.float32))
    torch._dynamo.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported, match="_run_uncompiled"):
        torch.compile(program, fullgraph=True, backend="aot_eager")(x)

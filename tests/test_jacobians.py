"""Several gradients of the same results, and gradients of a few inputs only."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import functional_call, grad, jacrev, vmap
from torch.utils._pytree import tree_leaves, tree_map

import fastlstm
from cases import tolerance
from fastlstm import backward, gradients, reference
from transforms import CALLS, CASES, MODULES, assert_same

NAMES = ("weights", "x", "h0", "c0")
EVERY = (0, 1, 2, 3)
Function = Callable[..., Tensor]


@pytest.fixture(params=CASES, ids=" - ".join)
def case(request) -> tuple[Function, tuple[Any, ...]]:
    """Twelve results of weights, x (3, 2, 2), h0 and c0 (both with samples), and these."""
    module, call = request.param
    torch.manual_seed(0)
    lstm = fastlstm.LSTM(2, 3, **MODULES[module]).double()
    sides = lstm.num_layers * (1 + lstm.bidirectional)

    def results(weights: dict[str, Tensor], x: Tensor, h0: Tensor, c0: Tensor) -> Tensor:
        output, *rest = functional_call(lstm, weights, (x, (h0, c0)), CALLS[call])
        leaves = [output[:, -1], *tree_leaves(rest)]
        return torch.stack([(leaf * leaf.cos()).sum() for leaf in leaves for _ in range(2)] * 2)

    one = dict(dtype=torch.float64)
    weights = {name: p.detach() for name, p in lstm.named_parameters()}
    states = (torch.randn(sides, 2, size, **one) for size in (lstm.proj_size or 3, 3))
    return results, (weights, torch.randn(3, 2, 2, **one), *states)


@pytest.fixture(params=[32 << 20, 1], ids=["together", "one at a time"])
def slices(request, monkeypatch) -> None:
    monkeypatch.setattr(gradients, "_SEVERAL_BYTES", request.param)


def rows(results: Function, given: tuple[Any, ...], graph: bool = False) -> list[Tensor]:
    """The Jacobian's parts, one gradient after the other, by plain autograd."""
    if not graph:
        given = tree_map(lambda t: t.clone().requires_grad_(), given)
    leaves = tree_leaves(given)
    found = [
        torch.autograd.grad(one, leaves, create_graph=graph, retain_graph=True)
        for one in results(*given)
    ]
    return [torch.stack(each) for each in zip(*found, strict=True)]


@pytest.mark.usefixtures("slices")
def test_jacobians(case) -> None:
    results, given = case
    wanted = rows(results, given)
    count = len(given[0])
    assert_same(jacrev(results, EVERY)(*given), wanted)
    assert_same(jacrev(results, 0)(*given), wanted[:count])
    for k in (1, 2, 3):
        assert_same(jacrev(results, k)(*given), wanted[count + k - 1])


def test_of_samples(case) -> None:
    """Which share their weights, with and without these."""
    results, (weights, *rest) = case
    many = [torch.stack([t, 2 * t, t.sin()], 1) for t in rest]
    dims = (None, 1, 1, 1)
    alone = [rows(results, (weights, *(t[:, k] for t in many))) for k in range(3)]
    wanted = [torch.stack(each) for each in zip(*alone, strict=True)]
    assert_same(vmap(jacrev(results, EVERY), dims)(weights, *many), wanted)
    assert_same(vmap(jacrev(results, (1, 2, 3)), dims)(weights, *many), wanted[len(weights) :])


def test_differentiated_again(case) -> None:
    """By torch.func and by autograd, of some inputs and of all."""
    results, given = case

    def penalty(*given: Any, by: tuple[int, ...]) -> Tensor:
        return sum(t.square().sum() for t in tree_leaves(jacrev(results, by)(*given)))

    def penalty_of_rows(*given: Any, by: tuple[int, ...]) -> Tensor:
        found = rows(results, given, graph=True)
        return sum(t.square().sum() for t in (found if 0 in by else found[len(given[0]) :]))

    own = tree_map(lambda t: t.clone().requires_grad_(), given)
    leaves = tree_leaves(own)
    for by in (EVERY, (1, 2, 3)):
        wanted = torch.autograd.grad(penalty_of_rows(*own, by=by), leaves)
        assert_same(torch.autograd.grad(penalty(*own, by=by), leaves), wanted)
        assert_same(grad(penalty, EVERY)(*given, by=by), wanted)


@pytest.mark.usefixtures("slices")
def test_a_batch_of_gradients(case) -> None:
    """As ``jacobian(vectorize=True)`` gives it, for some inputs and for all."""
    results, given = case
    own = tree_map(lambda t: t.clone().requires_grad_(), given)
    leaves, wanted = tree_leaves(own), rows(results, given)
    together = results(*own)
    several = torch.eye(len(together), dtype=together.dtype)
    for part in (slice(None), slice(len(given[0]), None), slice(1)):
        found = torch.autograd.grad(
            together, leaves[part], several, is_grads_batched=True, retain_graph=True
        )
        assert_same(found, wanted[part])
        assert not any(t.requires_grad for t in found)
    found = torch.autograd.grad(together, leaves, several, is_grads_batched=True, create_graph=True)
    assert_same(found, wanted)
    again = torch.autograd.grad(sum(t.square().sum() for t in found), leaves)
    alone = torch.autograd.grad(
        sum(t.square().sum() for t in rows(results, own, graph=True)), leaves
    )
    assert_same(again, alone)


@pytest.mark.parametrize("vectorize", [False, True])
def test_hessians(vectorize: bool) -> None:
    """A batch of gradients of gradients, of which the inner ones are a batch too."""
    lstm = fastlstm.LSTM(2, 3).double()
    x = torch.randn(2, 1, 2, dtype=torch.float64)
    found = torch.autograd.functional.hessian(
        lambda x: lstm(x)[0].sin().sum(), x, vectorize=vectorize
    )
    assert_same(found, torch.func.hessian(lambda x: lstm(x)[0].sin().sum())(x))
    jacobian = torch.autograd.functional.jacobian
    together = jacobian(
        lambda x: jacobian(lambda x: lstm(x)[0].sin(), x, create_graph=True, vectorize=vectorize),
        x, vectorize=vectorize,
    )  # fmt: skip
    assert_same(together, jacrev(jacrev(lambda x: lstm(x)[0].sin()))(x))


def test_batches_in_forward_mode() -> None:
    """What autograd.functional and gradcheck make of several tangents at once."""
    lstm = fastlstm.LSTM(2, 3, bidirectional=True).double()
    x = torch.randn(2, 1, 2, dtype=torch.float64)
    options: dict[str, Any] = dict(strategy="forward-mode", vectorize=True)

    def run(x: Tensor) -> Tensor:
        return lstm(x)[0].sin()

    assert_same(torch.autograd.functional.jacobian(run, x, **options), jacrev(run)(x))
    options = dict(outer_jacobian_strategy="forward-mode", vectorize=True)
    found = torch.autograd.functional.hessian(lambda x: run(x).sum(), x, **options)
    assert_same(found, jacrev(jacrev(lambda x: run(x).sum()))(x))
    assert torch.autograd.gradcheck(
        run, x.requires_grad_(), check_forward_ad=True, check_batched_forward_grad=True
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_of_other_dtypes(dtype: torch.dtype) -> None:
    lstm = fastlstm.LSTM(5, 7, bidirectional=True, dtype=dtype)
    weights = {name: p.detach() for name, p in lstm.named_parameters()}
    x = torch.randn(6, 2, 5, dtype=dtype)

    def results(weights: dict[str, Tensor], x: Tensor) -> Tensor:
        return functional_call(lstm, weights, (x,))[0][-1, -1]

    found = jacrev(results, (0, 1))(weights, x)
    for got, want in zip(tree_leaves(found), rows(results, (weights, x)), strict=True):
        torch.testing.assert_close(got, want, **tolerance(dtype))


class _Further(torch.autograd.Function):
    """Twice x, by a backward pass that asks for several gradients of an LSTM itself."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, lstm: torch.nn.Module) -> Tensor:
        ctx.lstm = lstm
        ctx.save_for_backward(x)
        return x * 2

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        with torch.enable_grad():
            x = ctx.saved_tensors[0].detach().requires_grad_()
            y = ctx.lstm(x)[0]
        several = torch.stack([dy, dy.cos()])
        (found,) = torch.autograd.grad(y, x, several, is_grads_batched=True)
        return found.sum(0), None


@pytest.mark.parametrize("which", ["inside", "outside"])
def test_batches_of_gradients_in_one_another(which: str) -> None:
    """What an inner call is given may be several of the outer call's, or only of its own."""
    lstm = fastlstm.LSTM(4, 4).double()
    theirs = torch.nn.LSTM(4, 4).double()
    theirs.load_state_dict(lstm.state_dict())
    x = torch.randn(3, 2, 4, dtype=torch.float64, requires_grad=True)
    several = torch.eye(24, dtype=torch.float64).view(24, 3, 2, 4)
    found = []
    for module in (lstm, theirs):
        if which == "inside":
            y = _Further.apply(x, module)
            found += torch.autograd.grad(y, x, several, is_grads_batched=True)
        else:
            y, rows = module(x)[0], []

            def run(zero: Tensor, y: Tensor = y, rows: list[Tensor] = rows) -> Tensor:
                rows += torch.autograd.grad(y, x, several, is_grads_batched=True)
                return zero

            vmap(run)(torch.zeros(2))
            found += rows
    assert_same(*found)


def test_a_batch_of_gradients_that_a_transform_wraps_is_refused() -> None:
    lstm = fastlstm.LSTM(2, 3)
    x = torch.randn(4, 2, 2, requires_grad=True)
    y = lstm(x)[0]
    several = torch.randn(5, *y.shape)

    def loss(zero: Tensor) -> Tensor:
        torch.autograd.grad(y, x, several, is_grads_batched=True)
        return zero

    with pytest.raises(RuntimeError, match="is_grads_batched=True: got gradients that a torch"):
        grad(loss)(torch.tensor(0.0))


@pytest.mark.usefixtures("slices")
def test_several_of_several() -> None:
    """Of one result, by each of some heads."""
    lstm = fastlstm.LSTM(2, 3).double()
    weights = {name: p.detach() for name, p in lstm.named_parameters()}
    heads = torch.randn(5, 3, 4, dtype=torch.float64)
    x = torch.randn(4, 2, 2, dtype=torch.float64)

    def results(weights: dict[str, Tensor], x: Tensor, head: Tensor) -> Tensor:
        return (functional_call(lstm, weights, (x,))[0][-1] @ head).flatten()

    alone = [rows(results, (weights, x, head)) for head in heads]
    wanted = [torch.stack(each) for each in zip(*alone, strict=True)]
    for dims, given in ((0, heads), (2, heads.movedim(0, 2))):
        found = vmap(jacrev(results, (0, 1, 2)), (None, None, dims))(weights, x, given)
        assert_same(found, wanted)
        found = vmap(jacrev(results, 1), (None, None, dims))(weights, x, given)
        assert_same(found, wanted[len(weights)])


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_a_graph_of_several_has_those_asked_for_only(backend: str, monkeypatch) -> None:
    """There are as many gradients of weights as several, which is much."""
    lstm, made = fastlstm.LSTM(2, 3, backend=backend), []
    differentiate, several_of = gradients.differentiate, backward.first_order_of_several

    def watched(outputs: Any, inputs: Any, *rest: Any) -> Any:
        made.append(len(inputs))
        return differentiate(outputs, inputs, *rest)

    def watched_kernels(run: Any, need: Any, *rest: Any) -> Any:
        made.append(sum(need) + need.bias)  # two biases
        return several_of(run, need, *rest)

    monkeypatch.setattr(gradients, "differentiate", watched)
    monkeypatch.setattr(backward, "first_order_of_several", watched_kernels)
    x = torch.randn(3, 2, 2, requires_grad=True)
    y = lstm(x)[0]
    several = torch.randn(5, *y.shape)
    for inputs, count in (([x], 1), ([x, *lstm.parameters()], 5)):
        torch.autograd.grad(
            y, inputs, several, is_grads_batched=True, create_graph=True, retain_graph=True
        )
        assert made.pop() == count and not made


def test_the_kernels_run(monkeypatch) -> None:
    lstm = fastlstm.LSTM(2, 3, num_layers=2, backend="cpu")
    weights = {name: p.detach() for name, p in lstm.named_parameters()}
    x, many = torch.randn(3, 2, 2, requires_grad=True), torch.randn(4, 3, 2, 2)

    def results(weights: dict[str, Tensor], x: Tensor) -> Tensor:
        return functional_call(lstm, weights, (x,))[0][-1, 0]

    def refuse(*_: Any) -> None:
        raise AssertionError("the reference ran")

    monkeypatch.setattr(reference, "layer_forward", refuse)
    assert jacrev(results)(weights, x)["weight_hh_l0"].any()
    assert vmap(jacrev(results, (0, 1)), (None, 0))(weights, many)[1].any()
    assert torch.autograd.functional.jacobian(lambda x: lstm(x)[0], x, vectorize=True).any()


@pytest.mark.parametrize("checkpoint", [False, True])
def test_of_no_sequences(checkpoint: bool) -> None:
    lstm = fastlstm.LSTM(2, 3, checkpoint=checkpoint)
    x = torch.randn(4, 0, 2, requires_grad=True)
    y = lstm(x)[0]
    inputs = [x, *lstm.parameters()]
    found = torch.autograd.grad(y, inputs, torch.randn(5, 4, 0, 3), is_grads_batched=True)
    for got, given in zip(found, inputs, strict=True):
        assert got.shape == (5, *given.shape) and not got.any()


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_of_nothing(backend: str) -> None:
    lstm = fastlstm.LSTM(2, 3, backend=backend)
    weights = {name: p.detach() for name, p in lstm.named_parameters()}
    x = torch.randn(3, 2, 2)

    def none(weights: dict[str, Tensor], x: Tensor) -> Tensor:
        return functional_call(lstm, weights, (x,))[0][:0]

    for got, want in zip(
        tree_leaves(jacrev(none, (0, 1))(weights, x)), (*weights.values(), x), strict=True
    ):
        assert got.shape == (0, 2, 3, *want.shape)


# ---- gradients of a few inputs only -------------------------------------------------------------


@pytest.mark.parametrize("call", ["padded", "lengths", "cells"])
@pytest.mark.parametrize("module", ["plain", "both directions, two layers", "checkpoint"])
def test_what_nobody_asks_for_is_not_made(module: str, call: str, monkeypatch) -> None:
    monkeypatch.setattr(gradients, "_WORTH_ASKING", 0)  # small layers ask too
    lstm = fastlstm.LSTM(2, 3, **MODULES[module]).double()
    x = torch.randn(3, 2, 2, dtype=torch.float64, requires_grad=True)
    scale = torch.ones(1, dtype=torch.float64, requires_grad=True)
    weights = {name: p * scale for name, p in lstm.named_parameters()}  # and so no leaves
    leaves = [x, scale, *lstm.parameters()]
    for given in ({}, weights):
        y = functional_call(lstm, given, (x,), CALLS[call])[0]
        nodes, made = _layers_of(y), _Made()
        for node in nodes:
            node.register_hook(partial(made.note, node))
        some = [leaf for leaf in leaves if leaf is not scale or given]
        wanted = torch.autograd.grad(y.sin().sum(), some, retain_graph=True)
        assert len(made) == len(nodes) == lstm.num_layers and all(map(all, made))
        for k, leaf in enumerate(some):
            made.clear()
            (got,) = torch.autograd.grad(y.sin().sum(), leaf, retain_graph=True)
            torch.testing.assert_close(got, wanted[k], rtol=0, atol=0)
            if leaf is x:
                assert made == [[True] + [False] * (len(flags) - 1) for flags in made]
            elif leaf is scale:
                assert all(all(flags[1:]) for flags in made)
            if leaf is x or leaf is scale:
                assert len(made) == len(nodes)
        x.grad = None
        y.sin().sum().backward(inputs=[x], retain_graph=True)
        torch.testing.assert_close(x.grad, wanted[0], rtol=0, atol=0)
        assert lstm.weight_ih_l0.grad is None


class _Made(list[list[bool]]):
    """Which of the gradients that somebody may want each layer has made."""

    def note(self, node: Any, found: Sequence[Tensor | None], _: Any) -> None:
        edges = zip(found, node.next_functions, strict=True)
        self.append([got is not None for got, (further, _) in edges if further is not None])


def _layers_of(y: Tensor) -> list[Any]:
    """The nodes of our Functions in a graph."""
    found, seen, todo = [], set(), [y.grad_fn]
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if node.name() in ("PlainLayerBackward", "LSTMLayerBackward"):
            found.append(node)
        todo += [further for further, _ in node.next_functions]
    return found

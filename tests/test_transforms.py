"""torch.func: grad and vjp run the kernels; with other transforms the reference runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap

import fastlstm
from cases import tolerance
from fastlstm import modes, reference

MODULES: dict[str, dict[str, Any]] = {
    "plain": {},
    "both directions, two layers": dict(bidirectional=True, num_layers=2),
    "projection": dict(proj_size=2),
    "no bias": dict(bias=False),
    "checkpoint": dict(checkpoint=True),
    "reference": dict(backend="reference"),
    "aten": dict(backend="aten"),
}
CALLS: dict[str, dict[str, Any]] = {
    "padded": {},
    "lengths": dict(lengths=torch.tensor([2, 3])),
    "resets": dict(reset=torch.tensor([[1, 0], [0, 1], [1, 0]], dtype=torch.bool)),
    "cells": dict(return_cells=True),
}
CASES = [
    (module, call)
    for module in MODULES
    for call in CALLS
    if module != "aten" or call in ("padded", "lengths")
]
Function = Callable[[dict[str, Tensor], Tensor], Tensor]


@pytest.fixture(params=CASES, ids=" - ".join)
def case(request) -> tuple[Function, dict[str, Tensor], Tensor]:
    """A loss of weights and x (3, 2, 2), and these."""
    module, call = request.param
    torch.manual_seed(0)
    lstm = fastlstm.LSTM(2, 3, **MODULES[module]).double()

    def loss(weights: dict[str, Tensor], x: Tensor) -> Tensor:
        output, (h_n, c_n), *cells = functional_call(lstm, weights, (x,), CALLS[call])
        return output.sin().sum() + h_n.square().sum() + c_n.square().sum() + sum(map(_sum, cells))

    weights = {name: p.detach() for name, p in lstm.named_parameters()}
    return loss, weights, torch.randn(3, 2, 2, dtype=torch.float64)


def _sum(cells: Tensor) -> Tensor:
    return cells.cos().sum()


def same(run: Callable[[], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """The same as through the reference's operators, which torch transforms by itself."""
    found = torch.utils._pytree.tree_leaves(run())
    with monkeypatch.context() as patch:
        patch.setattr(modes, "is_differentiated", lambda: False)
        wanted = torch.utils._pytree.tree_leaves(run())
    assert any(bool(want.any()) for want in wanted)
    for got, want in zip(found, wanted, strict=True):
        torch.testing.assert_close(got, want, **tolerance(torch.float64))


def test_gradients(case, monkeypatch) -> None:
    loss, weights, x = case
    same(lambda: grad(loss, (0, 1))(weights, x), monkeypatch)
    eager = {name: w.clone().requires_grad_() for name, w in weights.items()}
    wanted = torch.autograd.grad(loss(eager, x), list(eager.values()))
    for got, want in zip(grad(loss)(weights, x).values(), wanted, strict=True):
        torch.testing.assert_close(got, want, **tolerance(torch.float64))


def test_pulled_back_after_the_transform_has_ended(case, monkeypatch) -> None:
    loss, weights, x = case
    two = torch.tensor(2.0, dtype=torch.float64)
    same(lambda: vjp(loss, weights, x)[1](two), monkeypatch)
    several = torch.randn(3, *x.shape, dtype=torch.float64)
    slope = grad(loss, 1)
    same(lambda: vjp(lambda x: slope(weights, x), x)[1](several[0]), monkeypatch)
    same(lambda: vmap(vjp(lambda x: slope(weights, x), x)[1])(several), monkeypatch)


def test_gradients_of_gradients(case, monkeypatch) -> None:
    loss, weights, x = case

    def penalty(weights: dict[str, Tensor], x: Tensor) -> Tensor:
        slopes = grad(loss, (0, 1))(weights, x)
        return sum(g.square().sum() for g in torch.utils._pytree.tree_leaves(slopes))

    same(lambda: grad(penalty, (0, 1))(weights, x), monkeypatch)
    third = grad(lambda x: grad(penalty, 1)(weights, x).square().sum())
    same(lambda: third(x), monkeypatch)


def test_mixed_with_other_transforms(case, monkeypatch) -> None:
    loss, weights, x = case
    slope = grad(loss, 1)
    for transform in (jacrev, jacfwd, hessian):
        same(lambda transform=transform: transform(lambda x: loss(weights, x))(x), monkeypatch)
    same(lambda: jacrev(lambda x: slope(weights, x))(x), monkeypatch)
    same(lambda: jacrev(grad(loss))(weights, x), monkeypatch)
    same(lambda: jvp(lambda x: slope(weights, x), (x,), (x.cos(),)), monkeypatch)
    jacobian = jacrev(lambda x: loss(weights, x).sin())
    same(lambda: grad(lambda x: jacobian(x).square().sum())(x), monkeypatch)


def test_of_parameters_that_eager_code_differentiates(monkeypatch) -> None:
    lstm = fastlstm.LSTM(2, 3).double()
    x = torch.randn(3, 2, 2, dtype=torch.float64, requires_grad=True)

    def run() -> tuple[Tensor, ...]:
        slope = grad(lambda x: lstm(x)[0].square().sum())(x)
        return torch.autograd.grad(slope.square().sum(), [x, *lstm.parameters()])

    same(run, monkeypatch)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_other_dtypes(dtype: torch.dtype) -> None:
    lstm = fastlstm.LSTM(5, 7, bidirectional=True, dtype=dtype)
    x = torch.randn(4, 3, 5, dtype=dtype)
    weights = {name: p.detach() for name, p in lstm.named_parameters()}
    found = grad(lambda w: functional_call(lstm, w, (x,))[0].float().square().sum())(weights)
    loss = lstm(x)[0].float().square().sum()
    for got, want in zip(found.values(), torch.autograd.grad(loss, lstm.parameters()), strict=True):
        torch.testing.assert_close(got, want, **tolerance(dtype))


def test_grad_runs_the_kernels(monkeypatch) -> None:
    """And not the reference, which is what is slow."""
    lstm = fastlstm.LSTM(2, 3, num_layers=2, backend="cpu")
    x = torch.randn(3, 2, 2)

    def refuse(*_: Any) -> None:
        raise AssertionError("the reference ran")

    monkeypatch.setattr(reference, "layer_forward", refuse)
    assert grad(lambda x: lstm(x)[0].sum())(x).any()
    two = torch.tensor(2.0)
    assert vjp(lambda x: lstm(x, lengths=[1, 3])[0].sum(), x)[1](two)[0].any()
    with pytest.raises(AssertionError, match="the reference ran"):
        jvp(lambda x: lstm(x)[0].sum(), (x,), (x,))


def test_a_backend_that_cannot_serve_says_so() -> None:
    lstm = fastlstm.LSTM(2, 3, backend="aten")
    reset = torch.ones(3, 2, dtype=torch.bool)
    with pytest.raises(RuntimeError, match="torch's own LSTM has no resets"):
        grad(lambda x: lstm(x, reset=reset)[0].sum())(torch.randn(3, 2, 2))

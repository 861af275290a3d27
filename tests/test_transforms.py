"""torch.func: grad, vjp and vmap run the kernels; with other transforms the reference runs."""

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
        patch.setattr(modes, "_are_transforms", lambda *_: False)
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


# ---- vmap --------------------------------------------------------------------------------------

SAMPLES = 3


class Mapped:
    """A module's call as a function of five arguments, some of which come in samples."""

    NAMES = ("weights", "x", "h0", "c0", "reset")

    def __init__(self, module: str, call: str, which: tuple[str, ...]) -> None:
        options = MODULES[module]
        self.lstm = lstm = fastlstm.LSTM(2, 3, **options).double()
        self.call = CALLS[call]
        sides = lstm.num_layers * (1 + lstm.bidirectional)
        one = dict(dtype=torch.float64)
        self.given: list[Any] = [
            {name: torch.randn(SAMPLES, *p.shape, **one) for name, p in lstm.named_parameters()},
            torch.randn(SAMPLES, 3, 2, 2, **one),
            torch.randn(SAMPLES, sides, 2, lstm.proj_size or 3, **one),
            torch.randn(SAMPLES, sides, 2, 3, **one),
            torch.rand(SAMPLES, 3, 2) < 0.4,
        ]
        self.dims = tuple(0 if name in which else None for name in self.NAMES)
        for k, dim in enumerate(self.dims):
            self.given[k] = self.given[k] if dim == 0 else _of(self.given[k], 0)

    def outputs(self, weights: Any, x: Tensor, h0: Tensor, c0: Tensor, reset: Tensor) -> Any:
        options = self.call | (dict(reset=reset) if "reset" in self.call else {})
        output, states, *cells = functional_call(self.lstm, weights, (x, (h0, c0)), options)
        return (output, *states, *cells)

    def loss(self, *given: Any) -> Tensor:
        return sum(((1 + k) * out.sin()).sum() for k, out in enumerate(self.outputs(*given)))

    def each(self, run: Callable[..., Any]) -> list[Tensor]:
        """The leaves of what ``run`` returns for each sample, stacked."""
        found = []
        for k in range(SAMPLES):
            own = [_of(t, k) if d == 0 else t for t, d in zip(self.given, self.dims, strict=True)]
            found.append(torch.utils._pytree.tree_leaves(run(*own)))
        return [torch.stack(leaves) for leaves in zip(*found, strict=True)]


def _of(tree: Any, sample: int) -> Any:
    return torch.utils._pytree.tree_map(lambda t: t[sample], tree)


def eager(function: Callable[..., Tensor], wanted: tuple[int, ...]) -> Callable[..., Any]:
    """Gradients of some arguments, by plain autograd."""

    def run(*given: Any) -> Any:
        own = [
            torch.utils._pytree.tree_map(
                lambda t: t.clone().requires_grad_() if t.is_floating_point() else t, tree
            )
            for tree in given
        ]
        leaves = torch.utils._pytree.tree_leaves([own[k] for k in wanted])
        return torch.autograd.grad(function(*own), leaves)

    return run


def assert_same(found: Any, wanted: Any) -> None:
    pairs = zip(
        torch.utils._pytree.tree_leaves(found),
        torch.utils._pytree.tree_leaves(wanted),
        strict=True,
    )
    for got, want in pairs:
        torch.testing.assert_close(got, want, **tolerance(torch.float64))


WHICH = [("x",), ("weights",), ("h0",), ("x", "c0", "reset"), ("weights", "x"), Mapped.NAMES]


@pytest.fixture(params=CASES, ids=" - ".join)
def module_and_call(request) -> tuple[str, str]:
    torch.manual_seed(0)
    return request.param


@pytest.mark.parametrize("which", WHICH, ids=" ".join)
def test_samples(module_and_call, which) -> None:
    """Results and gradients of each, against plain calls and autograd one by one."""
    case = Mapped(*module_and_call, which)
    mapped = vmap(case.outputs, case.dims)
    assert_same(mapped(*case.given), case.each(case.outputs))
    with torch.no_grad():
        assert_same(mapped(*case.given), case.each(case.outputs))
    for wanted in ((0, 1, 2, 3), (1,), (0,), (2, 3)):
        found = vmap(grad(case.loss, wanted), case.dims)(*case.given)
        assert_same(found, case.each(eager(case.loss, wanted)))


@pytest.mark.parametrize("which", WHICH, ids=" ".join)
def test_gradients_of_all_samples(module_and_call, which) -> None:
    """grad and autograd around vmap, and around vmap of grad, which needs second order."""
    case = Mapped(*module_and_call, which)

    def total(*given: Any) -> Tensor:
        return vmap(case.loss, case.dims)(*given).square().sum()

    def total_one_by_one(*given: Any) -> Tensor:
        case.given = list(given)
        return case.each(case.loss)[0].square().sum()

    def penalty(*given: Any) -> Tensor:
        slopes = vmap(grad(case.loss, (0, 1)), case.dims)(*given)
        return sum(g.square().sum() for g in torch.utils._pytree.tree_leaves(slopes))

    def penalty_one_by_one(*given: Any) -> Tensor:
        case.given = list(given)

        def slopes(*own: Any) -> Any:
            own = torch.utils._pytree.tree_map(lambda t: t.view_as(t), list(own))
            leaves = torch.utils._pytree.tree_leaves(own[:2])
            return torch.autograd.grad(case.loss(*own), leaves, create_graph=True)

        return sum(g.square().sum() for g in case.each(slopes))

    given, every = list(case.given), (0, 1, 2, 3)
    for mapped, one_by_one in ((total, total_one_by_one), (penalty, penalty_one_by_one)):
        want = eager(one_by_one, every)(*given)
        assert_same(eager(mapped, every)(*given), want)
        assert_same(grad(mapped, every)(*given), want)


def test_samples_of_samples() -> None:
    lstm = fastlstm.LSTM(2, 3).double()
    weights = {name: p.detach() for name, p in lstm.named_parameters()}
    x = torch.randn(4, SAMPLES, 3, 2, 2, dtype=torch.float64)

    def loss(weights: dict[str, Tensor], x: Tensor) -> Tensor:
        return functional_call(lstm, weights, (x,))[0].sin().sum()

    along = vmap(grad(loss, (0, 1)), (None, 0))
    rows = [along(weights, each) for each in x]
    found = torch.utils._pytree.tree_leaves(vmap(along, (None, 0))(weights, x))
    wanted = [torch.utils._pytree.tree_leaves(row) for row in rows]
    assert_same(found, [torch.stack(leaves) for leaves in zip(*wanted, strict=True)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_samples_of_other_dtypes(dtype: torch.dtype) -> None:
    lstm = fastlstm.LSTM(5, 7, bidirectional=True, dtype=dtype)
    weights = {name: p.detach() for name, p in lstm.named_parameters()}
    x = torch.randn(6, 4, 1, 5, dtype=dtype)

    def loss(weights: dict[str, Tensor], x: Tensor) -> Tensor:
        return functional_call(lstm, weights, (x,))[0].float().square().sum()

    found = vmap(grad(loss), (None, 0))(weights, x)
    for k, sample in enumerate(x):
        for name, want in grad(loss)(weights, sample).items():
            torch.testing.assert_close(found[name][k], want, **tolerance(dtype))


def test_vmap_runs_the_kernels(monkeypatch) -> None:
    lstm = fastlstm.LSTM(2, 3, num_layers=2, backend="cpu")
    weights = {name: p.detach() for name, p in lstm.named_parameters()}
    many = {name: torch.stack([p, -p]) for name, p in weights.items()}
    x = torch.randn(2, 3, 2, 2)

    def loss(weights: dict[str, Tensor], x: Tensor) -> Tensor:
        return functional_call(lstm, weights, (x,))[0].sin().sum()

    def refuse(*_: Any) -> None:
        raise AssertionError("the reference ran")

    monkeypatch.setattr(reference, "layer_forward", refuse)
    assert vmap(grad(loss), (None, 0))(weights, x)["weight_hh_l1"].any()
    assert vmap(grad(loss))(many, x)["weight_hh_l1"].any()
    # Many models of few steps are less work for the reference, which has all of them at once.
    many = {name: torch.stack([p] * 10) for name, p in weights.items()}
    with pytest.raises(AssertionError, match="the reference ran"):
        vmap(loss, (0, None))(many, x[0])

"""torch.func.vmap: samples and models run the kernels, and each has its own gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import functional_call, grad, vmap
from torch.utils._pytree import tree_leaves, tree_map

import fastlstm
from cases import tolerance
from fastlstm import reference
from transforms import CALLS, CASES, MODULES, assert_same, eager

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
            found.append(tree_leaves(run(*own)))
        return [torch.stack(leaves) for leaves in zip(*found, strict=True)]


def _of(tree: Any, sample: int) -> Any:
    return tree_map(lambda t: t[sample], tree)


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
        return sum(g.square().sum() for g in tree_leaves(slopes))

    def penalty_one_by_one(*given: Any) -> Tensor:
        case.given = list(given)

        def slopes(*own: Any) -> Any:
            own = tree_map(lambda t: t.view_as(t), list(own))
            leaves = tree_leaves(own[:2])
            return torch.autograd.grad(case.loss(*own), leaves, create_graph=True)

        return sum(g.square().sum() for g in case.each(slopes))

    given, every = list(case.given), (0, 1, 2, 3)
    for mapped, one_by_one in ((total, total_one_by_one), (penalty, penalty_one_by_one)):
        want = eager(one_by_one, every)(*given)
        assert_same(eager(mapped, every)(*given), want)
        assert_same(grad(mapped, every)(*given), want)


def stacked(rows: list[Any]) -> list[Tensor]:
    """The leaves of all, stacked."""
    return [torch.stack(leaves) for leaves in zip(*map(tree_leaves, rows), strict=True)]


def test_samples_of_samples() -> None:
    """Whatever dimensions they lie along, and a few at a time."""
    lstm = fastlstm.LSTM(2, 3).double()
    weights = {name: p.detach() for name, p in lstm.named_parameters()}
    x = torch.randn(4, SAMPLES, 3, 2, 2, dtype=torch.float64)

    def loss(weights: dict[str, Tensor], x: Tensor) -> Tensor:
        return functional_call(lstm, weights, (x,))[0].sin().sum()

    alone = eager(loss, (0, 1))
    wanted = [stacked([alone(weights, sample) for sample in row]) for row in x]
    along = vmap(grad(loss, (0, 1)), (None, 0))
    assert_same(vmap(along, (None, 0))(weights, x), stacked(wanted))
    inner = vmap(grad(loss, (0, 1)), (None, -1), chunk_size=2)
    found = vmap(inner, (None, 1), out_dims=-1)(weights, x.permute(2, 0, 3, 4, 1))
    assert_same([leaf.movedim(-1, 0) for leaf in tree_leaves(found)], stacked(wanted))


def test_steps_of_several_tasks() -> None:
    """MAML: two steps of gradients for each sample, and the gradient through both."""
    lstm = fastlstm.LSTM(2, 3).double()
    weights = {name: p.detach() for name, p in lstm.named_parameters()}
    x = torch.randn(SAMPLES, 4, 2, 2, dtype=torch.float64)

    def loss(weights: dict[str, Tensor], x: Tensor) -> Tensor:
        return functional_call(lstm, weights, (x,))[0].sin().sum()

    def task(weights: dict[str, Tensor], x: Tensor) -> Tensor:
        for _ in range(2):
            slopes = grad(loss)(weights, x)
            weights = {name: w - 0.1 * slopes[name] for name, w in weights.items()}
        return loss(weights, x)

    def task_alone(weights: dict[str, Tensor], x: Tensor) -> Tensor:
        for _ in range(2):
            slopes = torch.autograd.grad(
                loss(weights, x), list(weights.values()), create_graph=True
            )
            steps = zip(weights.items(), slopes, strict=True)
            weights = {name: w - 0.1 * slope for (name, w), slope in steps}
        return loss(weights, x)

    def total(weights: dict[str, Tensor]) -> Tensor:
        return vmap(task, (None, 0))(weights, x).sum()

    wanted = eager(lambda w: sum(task_alone(w, sample) for sample in x), (0,))(weights)
    assert_same(grad(total)(weights), wanted)
    assert_same(eager(total, (0,))(weights), wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_samples_of_other_dtypes(dtype: torch.dtype) -> None:
    lstm = fastlstm.LSTM(5, 7, bidirectional=True, dtype=dtype)
    weights = {name: p.detach() for name, p in lstm.named_parameters()}
    x = torch.randn(6, 4, 1, 5, dtype=dtype)

    def loss(weights: dict[str, Tensor], x: Tensor) -> Tensor:
        return functional_call(lstm, weights, (x,))[0].float().square().sum()

    found = vmap(grad(loss), (None, 0))(weights, x)
    for k, sample in enumerate(x):
        wanted = eager(loss, (0,))(weights, sample)
        for got, want in zip(found.values(), wanted, strict=True):
            torch.testing.assert_close(got[k], want, **tolerance(dtype))


@pytest.mark.parametrize("directions", [1, 2])
def test_samples_in_chunks(directions: int) -> None:
    """Of a layer so long that it has other chunks with all samples than with one."""
    options = dict(checkpoint=True, bidirectional=directions == 2)
    lstm = fastlstm.LSTM(2, 3, **options).double()
    weights = {name: p.detach() for name, p in lstm.named_parameters()}
    x = torch.randn(SAMPLES, 300, 2, 2, dtype=torch.float64)

    def loss(weights: dict[str, Tensor], x: Tensor) -> Tensor:
        return functional_call(lstm, weights, (x,))[0].sin().sum()

    found = vmap(grad(loss, (0, 1)), (None, 0))(weights, x)
    for k, sample in enumerate(x):
        assert_same(_of(found, k), eager(loss, (0, 1))(weights, sample))


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


@pytest.mark.parametrize("shape", [(0, 3, 2, 2), (3, 3, 0, 2), (1, 3, 2, 2), (3, 3, 2)], ids=str)
def test_no_samples_or_sequences_or_only_one(shape: tuple[int, ...]) -> None:
    lstm = fastlstm.LSTM(2, 3)
    weights = {name: p.detach() for name, p in lstm.named_parameters()}
    x = torch.randn(shape)

    def loss(weights: dict[str, Tensor], x: Tensor) -> Tensor:
        return functional_call(lstm, weights, (x,))[0].sin().sum()

    found = vmap(grad(loss, (0, 1)), (None, 0))(weights, x)
    assert found[1].shape == shape
    for name, got in found[0].items():
        assert got.shape == (shape[0], *weights[name].shape)
    for k, sample in enumerate(x):
        wanted = eager(loss, (0, 1))(weights, sample)
        for got, want in zip(tree_leaves(found), wanted, strict=True):
            torch.testing.assert_close(got[k], want, **tolerance(torch.float32))


@pytest.mark.parametrize("backend", ["auto", "cpu", "reference"])
def test_samples_of_a_cell(backend: str) -> None:
    cell = fastlstm.LSTMCell(2, 3, backend=backend).double()
    weights = {name: p.detach() for name, p in cell.named_parameters()}
    x, h, c = (torch.randn(SAMPLES, 4, size, dtype=torch.float64) for size in (2, 3, 3))

    def loss(weights: dict[str, Tensor], *given: Tensor) -> Tensor:
        h, c = functional_call(cell, weights, (given[0], given[1:]))
        return h.sin().sum() + 2 * c.cos().sum()

    found = vmap(grad(loss, (0, 1, 2, 3)), (None, 0, 0, 0))(weights, x, h, c)
    for k in range(SAMPLES):
        wanted = eager(loss, (0, 1, 2, 3))(weights, x[k], h[k], c[k])
        assert_same(_of(found, k), wanted)


def test_a_cell_keeps_its_dtype_under_autocast() -> None:
    cell, x = fastlstm.LSTMCell(2, 3), torch.randn(SAMPLES, 4, 2)
    with torch.autocast("cpu", torch.bfloat16):
        assert vmap(lambda x: cell(x)[0])(x).dtype == cell(x[0])[0].dtype == torch.float32


def test_what_vmap_cannot_have() -> None:
    cell, lstm = fastlstm.LSTMCell(2, 3, backend="aten"), fastlstm.LSTM(2, 3)
    with pytest.raises(RuntimeError, match="vmap does not know torch's own cell"):
        vmap(cell)(torch.randn(SAMPLES, 4, 2))
    x, lengths = torch.randn(SAMPLES, 5, 2, 2), torch.tensor([[3, 5]] * SAMPLES)
    with pytest.raises(ValueError, match="expected the same for all samples"):
        vmap(lambda x, n: lstm(x, lengths=n)[0])(x, lengths)

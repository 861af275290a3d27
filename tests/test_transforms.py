"""torch.func, and forward-mode differentiation: the kernels run, and give what torch would."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import tree_leaves

import fastlstm
from cases import tolerance
from fastlstm import modes, reference
from transforms import CALLS, CASES, MODULES, assert_same

Function = Callable[[dict[str, Tensor], Tensor], Tensor]


# Those whose tangents take ways of their own through the kernels, and one that has none.
MOVED = [
    (module, call)
    for module, call in CASES
    if module in ("plain", "both directions, two layers", "projection")
    or (module, call) == ("checkpoint", "padded")
]


@pytest.fixture
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
    found = tree_leaves(run())
    with monkeypatch.context() as patch:
        patch.setattr(modes, "_are_transforms", lambda *_: False)
        wanted = tree_leaves(run())
    assert any(bool(want.any()) for want in wanted)
    for got, want in zip(found, wanted, strict=True):
        torch.testing.assert_close(got, want, **tolerance(torch.float64))


@pytest.mark.parametrize("case", CASES, ids=" - ".join, indirect=True)
def test_gradients(case, monkeypatch) -> None:
    loss, weights, x = case
    same(lambda: grad(loss, (0, 1))(weights, x), monkeypatch)
    eager = {name: w.clone().requires_grad_() for name, w in weights.items()}
    wanted = torch.autograd.grad(loss(eager, x), list(eager.values()))
    for got, want in zip(grad(loss)(weights, x).values(), wanted, strict=True):
        torch.testing.assert_close(got, want, **tolerance(torch.float64))


@pytest.mark.parametrize("case", CASES, ids=" - ".join, indirect=True)
def test_pulled_back_after_the_transform_has_ended(case, monkeypatch) -> None:
    loss, weights, x = case
    two = torch.tensor(2.0, dtype=torch.float64)
    same(lambda: vjp(loss, weights, x)[1](two), monkeypatch)
    several = torch.randn(3, *x.shape, dtype=torch.float64)
    slope = grad(loss, 1)
    same(lambda: vjp(lambda x: slope(weights, x), x)[1](several[0]), monkeypatch)
    same(lambda: vmap(vjp(lambda x: slope(weights, x), x)[1])(several), monkeypatch)


@pytest.mark.parametrize("case", CASES, ids=" - ".join, indirect=True)
def test_gradients_of_gradients(case, monkeypatch) -> None:
    loss, weights, x = case

    def penalty(weights: dict[str, Tensor], x: Tensor) -> Tensor:
        slopes = grad(loss, (0, 1))(weights, x)
        return sum(g.square().sum() for g in tree_leaves(slopes))

    same(lambda: grad(penalty, (0, 1))(weights, x), monkeypatch)
    third = grad(lambda x: grad(penalty, 1)(weights, x).square().sum())
    same(lambda: third(x), monkeypatch)


@pytest.mark.parametrize("case", CASES, ids=" - ".join, indirect=True)
def test_mixed_with_other_transforms(case, monkeypatch) -> None:
    loss, weights, x = case
    slope = grad(loss, 1)
    for transform in (jacrev, jacfwd, hessian):
        same(lambda transform=transform: transform(lambda x: loss(weights, x))(x), monkeypatch)
    same(lambda: jacrev(lambda x: slope(weights, x))(x), monkeypatch)
    same(lambda: jacrev(grad(loss))(weights, x), monkeypatch)
    same(lambda: jvp(lambda x: slope(weights, x), (x,), (x.cos(),)), monkeypatch)
    for direction in (1, (0, 1)):
        inner = lambda *given, direction=direction: jacrev(loss, direction)(*given)  # noqa: E731
        same(lambda inner=inner: jacfwd(inner, (0, 1))(weights, x), monkeypatch)
    jacobian = jacrev(lambda x: loss(weights, x).sin())
    same(lambda: grad(lambda x: jacobian(x).square().sum())(x), monkeypatch)


@pytest.mark.parametrize("case", MOVED, ids=" - ".join, indirect=True)
def test_pushed_forward(case, monkeypatch) -> None:
    loss, weights, x = case
    moved = {name: w.cos() for name, w in weights.items()}, x.cos()

    def push(*given: Any) -> Tensor:
        return jvp(loss, given, moved)[1]

    def penalty(weights: dict[str, Tensor], x: Tensor) -> Tensor:
        return sum(g.square().sum() for g in tree_leaves(grad(loss, (0, 1))(weights, x)))

    given = (weights, x)
    same(lambda: push(*given), monkeypatch)
    same(lambda: jvp(lambda x: loss(weights, x), (x,), moved[1:]), monkeypatch)
    same(lambda: jacfwd(loss, (0, 1))(*given), monkeypatch)
    same(lambda: grad(push, (0, 1))(*given), monkeypatch)
    same(lambda: jvp(push, given, moved), monkeypatch)
    same(lambda: jacfwd(jacfwd(lambda x: loss(weights, x)))(x), monkeypatch)
    same(lambda: jvp(grad(penalty, (0, 1)), given, moved), monkeypatch)
    with torch.no_grad():
        same(lambda: push(*given), monkeypatch)


@pytest.mark.parametrize("case", MOVED, ids=" - ".join, indirect=True)
def test_forward_mode_with_autograd(case, monkeypatch) -> None:
    """Dual tensors, what autograd makes of them, and what it makes of their tangents."""
    loss, weights, x = case

    def forward_over_reverse() -> Tensor:
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(x.clone().requires_grad_(), x.cos())
            (slope,) = torch.autograd.grad(loss(weights, dual), dual, create_graph=True)
            return forward_ad.unpack_dual(slope).tangent

    def reverse_over_forward() -> Any:
        leaf = x.clone().requires_grad_()
        with forward_ad.dual_level():
            made = forward_ad.unpack_dual(loss(weights, forward_ad.make_dual(leaf, x.cos())))
        return made.tangent.detach(), torch.autograd.grad(made.tangent, leaf)

    def with_transforms() -> Tensor:
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(x, x.cos())
            made = jacrev(jacrev(lambda x: loss(weights, x)))(dual)
            return forward_ad.unpack_dual(made).tangent

    same(with_transforms, monkeypatch)
    same(forward_over_reverse, monkeypatch)
    same(reverse_over_forward, monkeypatch)


@pytest.mark.parametrize("case", MOVED, ids=" - ".join, indirect=True)
def test_samples_pushed_forward(case, monkeypatch) -> None:
    """vmap over jvp and jvp over vmap, of samples and of directions; weights' too."""
    loss, weights, _ = case
    x = torch.randn(4, 3, 2, 2, dtype=torch.float64)
    several = {name: torch.randn(4, *w.shape, dtype=w.dtype) for name, w in weights.items()}

    def push(of_weights: dict[str, Tensor], x: Tensor, of_x: Tensor) -> Tensor:
        return jvp(loss, (weights, x), (of_weights, of_x))[1]

    def pushed_slopes(of_weights: dict[str, Tensor], x: Tensor, of_x: Tensor) -> Any:
        return jvp(grad(loss, (0, 1)), (weights, x), (of_weights, of_x))

    second = x.movedim(0, 1)
    for function in (push, pushed_slopes):
        same(lambda f=function: vmap(f)(several, x, x.cos()), monkeypatch)
        same(lambda f=function: vmap(f, (0, None, None))(several, x[0], x[1]), monkeypatch)
        same(lambda f=function: vmap(f, (None, 1, None))(weights, second, x[1]), monkeypatch)
    samples = vmap(grad(loss, (0, 1)), (None, 0))
    moved = ({name: w.cos() for name, w in weights.items()}, x.cos())
    same(lambda: jvp(samples, (weights, x), moved), monkeypatch)
    nested = vmap(vmap(push, (0, None, 0)), (None, 0, None))
    same(lambda: nested(several, x[:2], x), monkeypatch)


def test_what_is_trained_inside_of_a_dual_level() -> None:
    """Third order, where torch lets no other level be entered."""
    lstm = fastlstm.LSTM(2, 3).double()
    x = torch.randn(3, 2, 2, dtype=torch.float64)

    def train(module: nn.Module) -> list[Tensor]:
        with forward_ad.dual_level():
            made = forward_ad.unpack_dual(module(forward_ad.make_dual(x, x.cos()))[0]).tangent
            return list(torch.autograd.grad(made.square().sum(), lstm.parameters()))

    want = jvp(lambda x: lstm(x)[0], (x,), (x.cos(),))[1]
    assert_same(train(lstm), torch.autograd.grad(want.square().sum(), lstm.parameters()))


def test_several_tangents_of_some_weights_and_of_others(monkeypatch) -> None:
    """What differentiates them, of samples of which some share what others have of their own."""
    lstm = fastlstm.LSTM(2, 3).double()
    x = torch.randn(3, 2, 2, dtype=torch.float64)
    weights = {name: p.detach() for name, p in lstm.named_parameters()}
    inner, outer = torch.randn(2, 12, 2).double(), torch.randn(3, 12, 3).double()

    def moved(w_ih: Tensor, w_hh: Tensor) -> Tensor:
        def push(a: Tensor, b: Tensor) -> Tensor:
            def run(w_ih: Tensor, w_hh: Tensor) -> Tensor:
                own = {**weights, "weight_ih_l0": w_ih, "weight_hh_l0": w_hh}
                return functional_call(lstm, own, (x,))[0]

            return jvp(run, (w_ih, w_hh), (a, b))[1]

        return vmap(vmap(push, (None, 0)), (0, None))(inner, outer).square().sum()

    given = (weights["weight_ih_l0"], weights["weight_hh_l0"])
    same(lambda: grad(moved, (0, 1))(*given), monkeypatch)
    leaves = [w.clone().requires_grad_() for w in given]
    same(lambda: torch.autograd.grad(moved(*leaves), leaves), monkeypatch)


def test_third_order_of_samples_of_samples(monkeypatch) -> None:
    """Gradients of weights for each of the outer ones, from tangents of weights for each inner."""
    lstm = fastlstm.LSTM(2, 3, bidirectional=True).double()
    weights = {name: p.detach() for name, p in lstm.named_parameters()}
    x = torch.randn(4, 3, 5, 2, 2, dtype=torch.float64)

    def loss(weights: dict[str, Tensor], x: Tensor) -> Tensor:
        return functional_call(lstm, weights, (x,))[0].sin().sum()

    def penalty(weights: dict[str, Tensor], x: Tensor) -> Tensor:
        slopes = vmap(grad(loss), (None, 0))(weights, x)
        return sum(slope.square().sum() for slope in tree_leaves(slopes))

    def of_all(weights: dict[str, Tensor]) -> Tensor:
        slopes = vmap(grad(penalty), (None, 0))(weights, x)
        return sum(slope.cos().sum() for slope in tree_leaves(slopes))

    same(lambda: grad(of_all)(weights), monkeypatch)


def test_no_samples_pushed_forward() -> None:
    lstm = fastlstm.LSTM(2, 3, proj_size=2).double()
    x = torch.randn(3, 2, 2, dtype=torch.float64)
    weights = {name: p.detach() for name, p in lstm.named_parameters()}

    def run(weights: dict[str, Tensor], x: Tensor) -> Tensor:
        return functional_call(lstm, weights, (x,))[0].sin()

    none = x.new_zeros(0, *x.shape)
    assert vmap(lambda v: jvp(lambda x: run(weights, x), (x,), (v,))[1])(none).shape == none.shape
    slope = grad(lambda *given: run(*given).sum(), (0, 1))
    of_weights, of_x = vmap(lambda v: jvp(slope, (weights, x), (weights, v))[1])(none)
    assert of_x.shape == none.shape
    assert of_weights["weight_hh_l0"].shape == (0, 12, 2)
    empty = x[:, :0]
    assert jacfwd(lambda x: run(weights, x))(empty).shape == (3, 0, 2, 3, 0, 2)
    assert hessian(lambda x: run(weights, x).sum())(empty).shape == (3, 0, 2, 3, 0, 2)


def test_in_inference_mode() -> None:
    """Where weights require gradients, and what is moved can't be saved for them."""
    lstm = fastlstm.LSTM(2, 3).double()
    x = torch.randn(3, 2, 2, dtype=torch.float64)
    want = jvp(lambda x: lstm(x)[0], (x,), (x.cos(),))[1]
    with torch.inference_mode():
        made = x * 1
        found = jvp(lambda x: lstm(x)[0], (made,), (made.cos(),))[1]
        assert hessian(lambda x: lstm(x)[0].sum())(made).any()
    torch.testing.assert_close(found, want.detach(), **tolerance(torch.float64))


def test_of_parameters_that_eager_code_differentiates(monkeypatch) -> None:
    lstm = fastlstm.LSTM(2, 3).double()
    x = torch.randn(3, 2, 2, dtype=torch.float64, requires_grad=True)

    def run() -> tuple[Tensor, ...]:
        slope = grad(lambda x: lstm(x)[0].square().sum())(x)
        return torch.autograd.grad(slope.square().sum(), [x, *lstm.parameters()])

    same(run, monkeypatch)


# ---- against nn.LSTM, which torch transforms ----------------------------------------------------


class Pair:
    """Weights, and a call of an LSTM with them: of ours and of torch's."""

    def __init__(self, **config: Any) -> None:
        torch.manual_seed(0)
        self.stock = nn.LSTM(4, 3, **config).double()
        self.ours = fastlstm.LSTM(4, 3, **config).double()
        self.weights = {name: p.detach() for name, p in self.stock.named_parameters()}
        self.x = torch.randn(5, 2, 4, dtype=torch.float64)

    def agree(self, run: Callable[[Callable[..., Tensor]], Any]) -> None:
        """``run`` with a function from weights and x to the output."""
        found, wanted = (
            run(lambda w, x, lstm=lstm: functional_call(lstm, w, (x,))[0])
            for lstm in (self.ours, self.stock)
        )
        assert any(bool(want.any()) for want in tree_leaves(wanted))
        assert_same(found, wanted)


CONFIGS = [{}, dict(num_layers=2), dict(bidirectional=True), dict(num_layers=2, proj_size=2)]


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_what_only_an_outer_transform_differentiates(config: dict[str, Any]) -> None:
    """Inside of grad over something else, where no tensor says that it requires a gradient."""
    pair = Pair(**config)
    scale = torch.ones((), dtype=torch.float64)

    def inner(output, weights: dict[str, Tensor], x: Tensor) -> Tensor:
        def loss(scale: Tensor) -> Tensor:
            doubled = {name: 2 * w for name, w in weights.items()}
            return (scale.square() * output(doubled, x * 1).sin()).sum()

        return grad(loss)(scale)

    def of_eager_tensors(output) -> Any:
        x = pair.x.clone().requires_grad_()
        weights = {name: w.clone().requires_grad_() for name, w in pair.weights.items()}
        return torch.autograd.grad(inner(output, weights, x), [x, *weights.values()])

    pair.agree(of_eager_tensors)
    pair.agree(lambda output: grad(lambda w, x: inner(output, w, x), (0, 1))(pair.weights, pair.x))


@pytest.mark.parametrize("config", CONFIGS, ids=str)
@pytest.mark.parametrize("batched", [False, True])
def test_what_is_pulled_back_is_differentiated_later(config: dict[str, Any], batched: bool) -> None:
    """By eager code, of an input that was no eager leaf, and of what is pulled back."""
    pair = Pair(**config)

    def run(output) -> Any:
        x = pair.x.clone().requires_grad_()
        y, pull = vjp(lambda w, x: output(w, x).sin(), pair.weights, x)
        cotangent = y.detach().cos().requires_grad_()
        both = torch.stack([cotangent, 2 * cotangent])
        slopes = vmap(pull)(both) if batched else pull(cotangent)
        penalty = sum(g.square().sum() for g in tree_leaves(slopes))
        return torch.autograd.grad(penalty, [x, cotangent])

    pair.agree(run)


def test_output_may_be_changed_that_an_outer_transform_differentiates() -> None:
    pair, scale = Pair(), torch.ones((), dtype=torch.float64)

    def run(output) -> Any:
        def loss(w: dict[str, Tensor]) -> Tensor:
            return grad(lambda s: (s.square() * output(w, pair.x).relu_()).sum())(scale)

        return grad(loss)(pair.weights)

    pair.agree(run)


@pytest.mark.parametrize("order", [1, 2])
def test_traced_by_make_fx(order: int) -> None:
    lstm = fastlstm.LSTM(4, 3).double()

    def loss(x: Tensor) -> Tensor:
        if order == 1:
            return lstm(x)[0].sin().sum()
        return grad(lambda x: lstm(x)[0].sin().sum())(x).square().sum()

    x = torch.randn(2, 5, 2, 4, dtype=torch.float64)
    program = make_fx(grad(loss))(x[0])
    assert_same(program(x[1]), grad(loss)(x[1]))


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
    assert jvp(lambda x: lstm(x)[0].sum(), (x,), (x,))[1].any()
    assert hessian(lambda x: lstm(x)[0].sum())(x).any()
    with pytest.raises(AssertionError, match="the reference ran"):
        jvp(lambda x: jvp(lambda x: lstm(x)[0].sum(), (x,), (x,))[1], (x,), (x,))


def test_a_backend_that_cannot_serve_says_so() -> None:
    lstm = fastlstm.LSTM(2, 3, backend="aten")
    reset = torch.ones(3, 2, dtype=torch.bool)
    with pytest.raises(RuntimeError, match="torch's own LSTM has no resets"):
        grad(lambda x: lstm(x, reset=reset)[0].sum())(torch.randn(3, 2, 2))

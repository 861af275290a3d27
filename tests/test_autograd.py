"""Differentiation: first and second order, what is saved, transforms, and the operators."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

from cases import Layer, make_layer, tolerance
from fastlstm import LSTM, backends, reference
from fastlstm.autograd import lstm_layer
from fastlstm.contract import Weights, by_kind

BACKENDS = ("reference", "aten", "cpu")

GRADIENT_CASES = (
    Layer((2, 2, 1), 2, 3),
    Layer((2, 1), 2, 3, directions=2, reset=0.4),
    Layer((2, 2), 2, 3, projection=2, directions=2),
    Layer((2, 1, 0), 2, 3, bias=False, batch=3, reset=0.4),
    Layer((1,) * 5, 1, 2, directions=2),
)


def layer_function(
    case: Layer, backend: str, dtype: torch.dtype = torch.float64, cells: bool = True
):
    """A function of tensors alone, and the tensors, for gradcheck."""
    x, batch_sizes, h0, c0, weights, reset = make_layer(case, dtype, requires_grad=True)
    kinds = [[t is not None for t in w] for w in weights]
    cells &= backend != "aten"

    def run(x: Tensor, h0: Tensor, c0: Tensor, *flat: Tensor) -> tuple[Tensor, ...]:
        rest = iter(flat)
        unflat = [Weights(*(next(rest) if there else None for there in kind)) for kind in kinds]
        out = lstm_layer(x, batch_sizes, h0, c0, unflat, reset, need_cells=cells, backend=backend)
        return tuple(t for t in out if t is not None)

    return run, (x, h0, c0, *(t for w in weights for t in w if t is not None))


def serves(case: Layer, backend: str) -> bool:
    return backend != "aten" or not (case.reset or case.batch is not None)


CASES = [(c, b) for b in BACKENDS for c in GRADIENT_CASES if serves(c, b)]


@pytest.mark.parametrize(("case", "backend"), CASES, ids=str)
def test_gradcheck(case: Layer, backend: str) -> None:
    run, inputs = layer_function(case, backend)
    assert torch.autograd.gradcheck(run, inputs)


@pytest.mark.parametrize("cells", [True, False])
@pytest.mark.parametrize(("case", "backend"), CASES, ids=str)
def test_gradgradcheck(case: Layer, backend: str, cells: bool) -> None:
    run, inputs = layer_function(case, backend, cells=cells)
    assert torch.autograd.gradgradcheck(run, inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", GRADIENT_CASES, ids=str)
@pytest.mark.parametrize("cells", [True, False])
def test_what_is_differentiated_twice(case: Layer, dtype: torch.dtype, cells: bool) -> None:
    """More than twice through torch's own LSTM where it can; second order is the reference's."""
    x, batch_sizes, h0, _, weights, reset = make_layer(case, dtype)
    call = backends.Call(x, batch_sizes, h0, weights[0], reset, cells, False)
    own = dtype == torch.float32 and not cells and serves(case, "aten")
    assert backends.differentiable(call).name == ("aten" if own else "reference")

    def penalty(backend: str) -> tuple[Tensor, ...]:
        torch.manual_seed(0)
        run, inputs = layer_function(case, backend, dtype, cells)
        total = sum(out.float().sin().sum() for out in run(*inputs))
        first = torch.autograd.grad(total, inputs, create_graph=True)
        loss = sum(gradient.float().square().sum() for gradient in first)
        return torch.autograd.grad(loss, inputs)

    for a, b in zip(penalty("cpu"), penalty("reference"), strict=True):
        scale = max(1.0, float(b.abs().max()))
        torch.testing.assert_close(a / scale, b / scale, **tolerance(dtype))


def test_gradgradcheck_of_the_module() -> None:
    module = LSTM(2, 3, num_layers=2, bidirectional=True, proj_size=2, backend="cpu").double()
    names, parameters = zip(*module.named_parameters(), strict=True)

    def run(x: Tensor, *values: Tensor) -> tuple[Tensor, ...]:
        out, (h, c) = torch.func.functional_call(
            module, dict(zip(names, values, strict=True)), (x,)
        )
        return out, h, c

    x = torch.randn(2, 1, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(run, (x, *parameters))
    assert torch.autograd.gradgradcheck(run, (x, *parameters))


def test_third_order_equals_the_reference() -> None:
    def third(backend: str) -> Tensor:
        torch.manual_seed(1)
        run, (x, *rest) = layer_function(Layer((2, 2), 2, 3), backend)
        value = run(x, *rest)[0].pow(2).sum()
        for _ in range(2):
            (gradient,) = torch.autograd.grad(value, x, create_graph=True)
            value = gradient.pow(2).sum()
        return torch.autograd.grad(value, rest[2])[0]

    torch.testing.assert_close(third("cpu"), third("reference"))


def test_one_tensor_for_two_arguments() -> None:
    """(z, z) as the state: each use counts once, at first and second order."""
    x, batch_sizes, _, _, weights, _ = make_layer(Layer((2, 2), 2, 3), torch.float64)

    def run(z: Tensor) -> Tensor:
        return lstm_layer(x, batch_sizes, z, z, weights, backend="cpu")[0]

    z = torch.randn(1, 2, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(run, z)
    assert torch.autograd.gradgradcheck(run, z)


def test_gradient_penalty_trains() -> None:
    """WGAN-GP: the gradient's norm is part of the loss, and the loss goes down."""
    module = LSTM(3, 8, backend="cpu")
    optimizer = torch.optim.Adam(module.parameters(), 1e-2)
    x = torch.randn(5, 4, 3, requires_grad=True)
    losses = []
    for _ in range(20):
        (gradient,) = torch.autograd.grad(module(x)[0].sum(), x, create_graph=True)
        loss = (gradient.flatten(1).norm(dim=1) - 1).pow(2).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_backward_twice_is_bitwise_equal(backend: str, dtype: torch.dtype) -> None:
    run, inputs = layer_function(
        Layer((9, 9, 7, 2), 20, 35, projection=18, directions=2, reset=0.2), backend, dtype
    )
    total = sum(out.float().sum() for out in run(*inputs))
    first = torch.autograd.grad(total, inputs, retain_graph=True)
    second = torch.autograd.grad(total, inputs)
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)


def test_saved_tensors_changed_in_place_are_noticed() -> None:
    run, inputs = layer_function(Layer((2, 2), 2, 3), "cpu")
    y = run(*inputs)[0]
    y.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_reset_changed_in_place_is_noticed() -> None:
    """A buffer of `done` flags that is filled again before the backward pass."""
    module = LSTM(2, 3, backend="cpu")
    reset = torch.tensor([[True], [False], [True]])
    y = module(torch.randn(3, 1, 2), reset=reset)[0]
    reset.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_backward_under_autocast(backend: str) -> None:
    """Autocast may still be on when the gradients are taken: they are the same."""
    module = LSTM(3, 5, bidirectional=True, proj_size=2, backend=backend)
    x = torch.randn(4, 2, 3, requires_grad=True)

    def gradients(outside: bool) -> list[Tensor]:
        with torch.autocast("cpu", torch.bfloat16):
            total = module(x)[0].float().pow(2).sum()
            if not outside:
                first = torch.autograd.grad(total, x, create_graph=True)[0]
                return [first, *torch.autograd.grad(first.sum(), [*module.parameters()])]
        first = torch.autograd.grad(total, x, create_graph=True)[0]
        return [first, *torch.autograd.grad(first.sum(), [*module.parameters()])]

    for a, b in zip(gradients(True), gradients(False), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing(reentrant: bool) -> None:
    module = LSTM(4, 6, num_layers=2, bidirectional=True, backend="cpu")
    x = torch.randn(5, 3, 4, requires_grad=True)
    want = torch.autograd.grad(module(x)[0].pow(2).sum(), [x, *module.parameters()])
    checkpoint(lambda t: module(t)[0], x, use_reentrant=reentrant).pow(2).sum().backward()
    for a, b in zip((x.grad, *(p.grad for p in module.parameters())), want, strict=True):
        assert torch.equal(a, b)


def test_saved_tensors_go_through_hooks_once_and_in_any_layout() -> None:
    """As ``save_on_cpu`` and the like do; what comes back need not be contiguous."""
    module = LSTM(4, 6, bidirectional=True, backend="cpu")
    x = torch.randn(5, 3, 4)
    want = torch.autograd.grad(module(x)[0].sum(), [*module.parameters()])
    counts = {"packed": 0, "unpacked": 0}

    def pack(t: Tensor) -> Tensor:
        counts["packed"] += 1
        return t.transpose(0, -1).contiguous() if t.dim() > 1 else t.clone()

    def unpack(t: Tensor) -> Tensor:
        counts["unpacked"] += 1
        return t.transpose(0, -1) if t.dim() > 1 else t

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        total = module(x)[0].sum()
    got = torch.autograd.grad(total, [*module.parameters()])
    assert counts["unpacked"] == counts["packed"] > 0
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, **tolerance(torch.float32))


def test_only_what_requires_grad_gets_one() -> None:
    module = LSTM(3, 4, backend="cpu")
    module.weight_hh_l0.requires_grad_(False)
    module(torch.randn(5, 2, 3))[0].sum().backward()
    assert module.weight_hh_l0.grad is None
    assert all(p.grad is not None for n, p in module.named_parameters() if n != "weight_hh_l0")


def test_unused_outputs_cost_nothing() -> None:
    """Only the last state goes on: the gradients of the other outputs stay None."""
    run, inputs = layer_function(Layer((2, 2), 2, 3), "cpu")
    reference_run, _ = layer_function(Layer((2, 2), 2, 3), "reference")
    for pick in range(4):
        a = torch.autograd.grad(run(*inputs)[pick].sum(), inputs, allow_unused=True)
        b = torch.autograd.grad(reference_run(*inputs)[pick].sum(), inputs, allow_unused=True)
        for x, y in zip(a, b, strict=True):
            torch.testing.assert_close(x, y, **tolerance(torch.float64))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_transforms_are_right_and_never_zero(dtype: torch.dtype) -> None:
    """torch.func's grad, vmap and jvp, and dual numbers, against plain autograd."""
    run, inputs = layer_function(Layer((2, 2), 2, 3), "cpu", dtype)
    inputs = tuple(t.detach() for t in inputs)
    x, *rest = inputs

    def loss(x: Tensor) -> Tensor:
        return run(x, *rest)[0].pow(2).sum()

    leaf = x.clone().requires_grad_()
    (want,) = torch.autograd.grad(loss(leaf), leaf)
    near = tolerance(dtype)
    torch.testing.assert_close(torch.func.grad(loss)(x), want, **near)
    tangent = torch.randn_like(x)
    along = (want * tangent).sum()
    torch.testing.assert_close(torch.func.jvp(loss, (x,), (tangent,))[1], along, **near)
    with forward_ad.dual_level():
        dual = forward_ad.unpack_dual(loss(forward_ad.make_dual(x, tangent)))
    torch.testing.assert_close(dual.tangent, along, **near)
    many = torch.stack((x, 2 * x))
    torch.testing.assert_close(torch.func.vmap(torch.func.grad(loss))(many)[0], want, **near)
    hessian = torch.func.hessian(loss)(x)
    assert hessian.abs().max() > 0
    torch.testing.assert_close(hessian, torch.autograd.functional.hessian(loss, x), **near)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_batched_gradients(backend: str) -> None:
    """Several gradients of one output at once, as ``jacobian(vectorize=True)`` asks for them."""
    module = LSTM(2, 3, bidirectional=True, backend=backend).double()
    x = torch.randn(2, 2, 2, dtype=torch.float64, requires_grad=True)
    y = module(x)[0]
    several = torch.randn(3, *y.shape, dtype=torch.float64)
    inputs = [x, *module.parameters()]
    together = torch.autograd.grad(y, inputs, several, is_grads_batched=True, retain_graph=True)
    for k in range(3):
        alone = torch.autograd.grad(y, inputs, several[k], retain_graph=True)
        for a, b in zip(together, alone, strict=True):
            assert not a.requires_grad  # nobody has asked for a graph
            torch.testing.assert_close(a[k], b, **tolerance(torch.float64))
    mapped = torch.vmap(lambda v: torch.autograd.grad(y, x, v, retain_graph=True)[0])(several)
    torch.testing.assert_close(mapped, together[0], **tolerance(torch.float64))
    graphs = torch.autograd.grad(y, inputs, several, is_grads_batched=True, create_graph=True)
    second = torch.autograd.grad(sum(g[1].square().sum() for g in graphs), inputs)
    alone = torch.autograd.grad(y, inputs, several[1], create_graph=True)
    want = torch.autograd.grad(sum(g.square().sum() for g in alone), inputs)
    for a, b in zip(second, want, strict=True):
        torch.testing.assert_close(a, b, **tolerance(torch.float64))


@pytest.mark.parametrize("case", GRADIENT_CASES, ids=str)
@pytest.mark.parametrize("reserve", [False, True])
def test_operators_pass_opcheck(case: Layer, reserve: bool) -> None:
    layer = make_layer(case, torch.float32)
    x, batch_sizes, h0, c0, weights, reset = layer
    lists = by_kind(weights)
    args = (x, batch_sizes, h0, c0, *lists, reset, reserve, True, "cpu")
    torch.library.opcheck(torch.ops.fastlstm.layer_forward.default, args)
    saved = reference.layer_forward(*layer, True, True)
    m = x.new_empty(0) if saved.m is None else saved.m
    grads = [torch.randn_like(t) for t in saved[:4]]
    need = [True, reserve, True, True, reserve, True, reserve]
    torch.library.opcheck(
        torch.ops.fastlstm.layer_backward.default,
        (*grads, x, batch_sizes, h0, c0, *lists, reset, saved.y, saved.c_all, saved.gates, m,
         need, "cpu"),
    )  # fmt: skip


def test_operators_equal_direct_calls() -> None:
    """What tracing sees is what eager calls do without the dispatcher."""
    module = LSTM(3, 5, num_layers=2, bidirectional=True, backend="cpu")
    x = torch.randn(4, 2, 3)

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        seen: list[str] = []

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.seen.append(str(func))
            return func(*args, **(kwargs or {}))

    plain = module(x)[0]
    plain.sum().backward()
    gradients = [p.grad for p in module.parameters()]
    module.zero_grad()
    with Watch() as watch:
        watched = module(x)[0]
        watched.sum().backward()
    assert torch.equal(plain, watched)
    assert {"fastlstm.layer_forward.default", "fastlstm.layer_backward.default"} <= set(watch.seen)
    for a, b in zip(gradients, (p.grad for p in module.parameters()), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("wants_grad", [False, True])
def test_layer_names_the_argument_that_does_not_fit(backend: str, wants_grad: bool) -> None:
    x, batch_sizes, h0, c0, weights, _ = make_layer(
        Layer((2, 2), 2, 3), torch.float32, requires_grad=wants_grad
    )
    good = dict(x=x, batch_sizes=batch_sizes, h0=h0, c0=c0, weights=weights, reset=None)
    bad = [
        ("x", dict(x=x[0])),
        ("h0", dict(h0=h0[..., :2])),
        ("c0", dict(c0=c0.double())),
        (r"w_ih\[0\]", dict(weights=[weights[0]._replace(w_ih=weights[0].w_ih[:, :1])])),
        (r"w_hh\[0\]", dict(weights=[weights[0]._replace(w_hh=weights[0].w_hh.double())])),
        (r"bias\[0\]", dict(weights=[weights[0]._replace(bias=weights[0].bias[:1])])),
        ("directions", dict(weights=weights * 3)),
        ("batch_sizes", dict(batch_sizes=batch_sizes.int())),
        ("reset", dict(reset=torch.zeros(4))),
        ("backend", dict(backend="cudnn")),
    ]
    for name, change in bad:
        with pytest.raises(ValueError, match=name):
            lstm_layer(**{"backend": backend, **good, **change})


def test_named_backend_refuses_and_says_why() -> None:
    x, batch_sizes, h0, c0, weights, _ = make_layer(Layer((2, 2), 2, 3), torch.float32)
    reset = torch.zeros(4, dtype=torch.uint8)
    with pytest.raises(RuntimeError, match=r"backend 'aten' cannot serve this call: .*resets"):
        lstm_layer(x, batch_sizes, h0, c0, weights, reset, backend="aten")
    with pytest.raises(RuntimeError, match=r"backend 'aten' cannot serve this call: .*cell states"):
        lstm_layer(x, batch_sizes, h0, c0, weights, need_cells=True, backend="aten")
    meta = [Weights(*(None if t is None else t.to("meta") for t in w)) for w in weights]
    with pytest.raises(RuntimeError, match=r"backend 'cpu' cannot serve this call: .*cpu tensors"):
        lstm_layer(x.to("meta"), batch_sizes, h0.to("meta"), c0.to("meta"), meta, backend="cpu")


@pytest.mark.parametrize("backend", ["cpu", "aten"])
def test_compiles_fullgraph_and_trains(backend: str) -> None:
    """Two layers and directions, dynamic sizes, and one tensor for both states."""
    module = LSTM(3, 5, num_layers=2, bidirectional=True, backend=backend)
    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend="aot_eager")
    for steps, batch in ((4, 2), (6, 3)):
        x = torch.randn(steps, batch, 3)
        z = torch.zeros(4, batch, 5)
        want, got = (run(x, (z, z))[0] for run in (module, compiled))
        torch.testing.assert_close(got, want, **tolerance(torch.float32))
        parameters = [*module.parameters()]
        for a, b in zip(
            torch.autograd.grad(got.sum(), parameters),
            torch.autograd.grad(want.sum(), parameters),
            strict=True,
        ):
            torch.testing.assert_close(a, b, **tolerance(torch.float32))

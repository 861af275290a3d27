"""A layer's tangents, and what differentiates its backward pass, against autograd and nn.LSTM."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastlstm
from cases import LARGER, LAYERS, Layer, LayerTensors, make_layer, tolerance
from fastlstm import aten, backends, reference, tangents

pytest_plugins = ["cpu_fixtures"]
pytestmark = pytest.mark.usefixtures("poison")
_CPU = backends.plain_backend("cpu")
assert _CPU is not None
KERNELS = _CPU
TWINS = replace(
    KERNELS, layer_tangent=reference.layer_tangent, layer_curvature=reference.layer_curvature
)


def flat_inputs(layer: LayerTensors) -> list[Any]:
    x, _, h0, c0, weights, _ = layer
    return [x, h0, c0, *(t for w in weights for t in w)]


def some(tensors: list[Any], share: float) -> list[Any]:
    """Random tensors as these, and None for some."""
    return [
        None if t is None or float(torch.rand(())) > share else torch.randn_like(t) for t in tensors
    ]


@pytest.mark.parametrize(
    ("backend", "share", "case"),
    [
        *((KERNELS, share, case) for share in (1.0, 0.5) for case in LAYERS),
        *((KERNELS, 1.0, case) for case in LARGER[:5]),
        *((TWINS, 1.0, case) for case in LAYERS),
    ],
    ids=lambda value: getattr(value, "name", None) or str(value),
)
def test_second_order_equals_autograd(backend: backends.Backend, share: float, case: Layer) -> None:
    """Gradients of <v, J^T u>, torch differentiating the reference twice; float64."""
    torch.manual_seed(1)
    layer = make_layer(case, torch.float64, requires_grad=True)
    out, inputs = reference.layer_forward(*layer, True, True), flat_inputs(layer)
    grads = [t.requires_grad_() for t in map(torch.randn_like, out[:4])]  # type: ignore[arg-type]
    v = some(inputs, share)
    v[0] = torch.randn_like(inputs[0])
    leaves = [t for t in inputs if t is not None]
    pairs = [(o, g) for o, g in zip(out[:4], grads, strict=True) if o.requires_grad]  # type: ignore[union-attr]
    options: dict[str, Any] = dict(create_graph=True, materialize_grads=True)
    first = torch.autograd.grad([o for o, _ in pairs], leaves, [g for _, g in pairs], **options)
    weighed = zip(first, [d for t, d in zip(inputs, v, strict=True) if t is not None], strict=True)
    total = sum((g * d).sum() for g, d in weighed if d is not None and g.requires_grad)
    if not isinstance(total, Tensor):
        pytest.skip("of no steps everything is constant")
    want = torch.autograd.grad(total, [*grads, *leaves], materialize_grads=True)

    with torch.no_grad():
        asked = [True] * 4 + [t is not None for t in inputs]
        saved = (out.reserve(), layer.batch_sizes, layer.reset)
        found = tangents.second_order(backend, asked, *saved, v, grads, inputs)
    present = [t for t, a in zip(found, asked, strict=True) if a]
    for got, expected in zip(present, want, strict=True):
        assert got is not None
        torch.testing.assert_close(got, expected, **tolerance(torch.float64))


@pytest.mark.parametrize("case", [*LAYERS, *LARGER[:6]], ids=str)
def test_tangents_equal_torchs(case: Layer) -> None:
    """J v, torch differentiating the reference forward; float64."""
    torch.manual_seed(2)
    layer = make_layer(case, torch.float64)
    inputs = flat_inputs(layer)
    v = some(inputs, 1.0)
    out = reference.layer_forward(*layer, True, True)

    def results(*given: Tensor) -> tuple[Tensor, ...]:
        rest = iter(given)
        x, h0, c0, *flat = (None if t is None else next(rest) for t in inputs)
        size = len(flat) // case.directions
        weights = [type(layer.weights[0])(*flat[k : k + size]) for k in range(0, len(flat), size)]
        made = reference.layer_forward(x, layer.batch_sizes, h0, c0, weights, layer.reset, 0, True)  # type: ignore[arg-type]
        return made.y, made.c_all, made.h_n, made.c_n  # type: ignore[return-value]

    present = [t for t in inputs if t is not None]
    _, want = torch.func.jvp(results, tuple(present), tuple(t for t in v if t is not None))
    saved = (out.reserve(), layer.batch_sizes, layer.reset)
    found = tangents.layer_tangents(KERNELS, *saved, v, inputs)
    for got, expected in zip(found, want, strict=True):
        torch.testing.assert_close(got, expected, **tolerance(torch.float64))


def penalty(module: nn.Module, x: Tensor, **call: Any) -> list[Tensor]:
    """Gradients of the square of a gradient, and of what it depends on otherwise."""
    output, (h_n, c_n) = module(x, **call)[:2]
    total = output.sin().sum() + h_n.square().sum() + c_n.cos().sum()
    slopes = torch.autograd.grad(total, [x, *module.parameters()], create_graph=True)
    loss = sum((s.square().sum() for s in slopes), output.sum())
    return list(torch.autograd.grad(loss, [x, *module.parameters()]))


@pytest.mark.parametrize(
    "config",
    [{}, dict(num_layers=2, bidirectional=True), dict(proj_size=5), dict(bias=False)],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("shape", [(6, 3), (1, 4), (40, 1)], ids=str)
def test_penalties_are_those_of_nn_lstm(
    config: dict[str, Any], dtype: torch.dtype, shape: tuple[int, int]
) -> None:
    torch.manual_seed(0)
    stock = nn.LSTM(7, 19, **config).to(dtype)
    ours = fastlstm.LSTM(7, 19, backend="cpu", **config).to(dtype)
    ours.load_state_dict(stock.state_dict())
    x = torch.randn(*shape, 7, dtype=dtype, requires_grad=True)
    for got, want in zip(penalty(ours, x), penalty(stock, x), strict=True):
        scale = max(1.0, float(want.abs().max()))
        torch.testing.assert_close(got / scale, want / scale, **tolerance(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "call",
    [{}, dict(lengths=[2, 5, 0]), dict(reset=torch.arange(15).reshape(5, 3) % 4 == 2)],
    ids=["padded", "lengths", "reset"],
)
def test_kernels_make_second_order(
    dtype: torch.dtype, call: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And what torch would differentiate does not run."""
    module = fastlstm.LSTM(7, 19, bidirectional=True, backend="cpu", dtype=dtype)
    exact = fastlstm.LSTM(7, 19, bidirectional=True, backend="reference", dtype=torch.float64)
    exact.load_state_dict(module.state_dict())
    x = torch.randn(5, 3, 7, dtype=dtype, requires_grad=True)
    want = penalty(exact, x.detach().double().requires_grad_(), **call)

    def refuse(*_: Any) -> None:
        raise AssertionError("torch differentiates it")

    for other in (reference, aten):
        monkeypatch.setattr(other, "layer_forward", refuse)
    for name in ("aten", "reference"):
        entry = replace(backends._TABLE[name], layer_forward=refuse)
        monkeypatch.setitem(backends._TABLE, name, entry)
    for got, exactly in zip(penalty(module, x, **call), want, strict=True):
        scale = max(1.0, float(exactly.abs().max()))
        torch.testing.assert_close(got.double() / scale, exactly / scale, **tolerance(dtype))


def test_a_graph_of_it_imports_no_compiler() -> None:
    """Which takes seconds.  (Third order needs torch.func, which imports it.)"""
    program = (
        "import sys, torch, fastlstm\n"
        "x = torch.randn(4, 2, 3, requires_grad=True)\n"
        "y = fastlstm.LSTM(3, 5, backend='cpu')(x)[0].sum()\n"
        "for _ in range(2): (y,) = torch.autograd.grad(y, x, create_graph=True); y = y.sum()\n"
        "assert 'torch._dynamo' not in sys.modules"
    )
    subprocess.run([sys.executable, "-P", "-c", program], check=True)


def test_gradients_that_nobody_gives() -> None:
    """A Function between that returns none: nothing is computed, and none comes back."""

    class Stop(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, _: Tensor) -> None:
            return None

    module = fastlstm.LSTM(3, 4, backend="cpu")
    x = torch.randn(5, 2, 3, requires_grad=True)
    y = module(x)[0]
    for seeds in (torch.ones_like(y), torch.ones(2, *y.shape)):
        several = seeds.dim() > y.dim()
        options: dict[str, Any] = dict(is_grads_batched=several, retain_graph=True)
        (slope,) = torch.autograd.grad(y, x, seeds, create_graph=True, **options)
        found = torch.autograd.grad(Stop.apply(slope).sum(), x, allow_unused=True)
        assert found[0] is None or not found[0].any()


def test_second_order_of_what_was_kept_is_noticed_when_changed() -> None:
    """A reserve in use twice is checked twice."""
    module = fastlstm.LSTM(3, 4, backend="cpu")
    x = torch.randn(5, 2, 3, requires_grad=True)
    (slope,) = torch.autograd.grad(module(x)[0].sum(), x, create_graph=True)
    with torch.no_grad():
        x.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        slope.sum().backward()

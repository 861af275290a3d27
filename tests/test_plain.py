"""Plain calls (plain.py): the same as the long way, bit by bit, and taken where they should be."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.utils import parametrizations, prune
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import fastlstm
from cases import DTYPES, tolerance
from fastlstm import backends, cpu, plain

T, B, IN, H = 5, 3, 4, 6
X = torch.zeros(T, B, IN)
CONFIGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "no_bias": {"bias": False},
    "projection": {"proj_size": 2},
    "both_directions": {"bidirectional": True},
    "three_layers": {"num_layers": 3},
    "all_of_it": {"num_layers": 2, "bidirectional": True, "proj_size": 2, "bias": False},
}


@pytest.fixture
def ways(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Of each call of a module: was it the short way?"""
    taken: list[bool] = []
    run = plain.run

    def spy(*args: Any) -> Any:
        result = run(*args)
        taken.append(result is not None)
        return result

    monkeypatch.setattr(plain, "run", spy)
    return taken


@contextlib.contextmanager
def long_way() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plain, "run", lambda *_: None)
        yield


def make_state(module: fastlstm.LSTM, batch: int = B) -> tuple[Tensor, Tensor]:
    states, dtype = len(module._all_weights), module.weight_ih_l0.dtype
    sizes = (module.proj_size or module.hidden_size, module.hidden_size)
    h0, c0 = (torch.randn(states, batch, size).to(dtype) for size in sizes)
    return h0, c0


def everything(
    module: fastlstm.LSTM, x: Tensor, hx: Any, create_graph: bool = False, **options: Any
) -> Any:
    """Outputs, and all gradients of a weighting of them."""
    leaves = [x, *(hx or ())]
    y, (h_n, c_n) = module(x, hx, **options)
    generator = torch.Generator().manual_seed(1)
    weighting = [torch.randn(t.shape, generator=generator).to(t.dtype) for t in (y, h_n, c_n)]
    gradients = torch.autograd.grad(
        (y, h_n, c_n),
        [*leaves, *module.parameters()],
        weighting,
        create_graph=create_graph,
    )
    return [y, h_n, c_n, *gradients]


def assert_same_bits_both_ways(
    module: fastlstm.LSTM, x: Tensor, hx: Any, ways: list[bool], **options: Any
) -> None:
    """With gradients and without; whoever draws numbers leaves the generator alike."""
    for leaf in (x, *(hx or ())):
        leaf.requires_grad_()

    def results() -> list[Tensor]:
        torch.manual_seed(3)
        trained = everything(module, x, hx, **options)
        with torch.no_grad():
            y, (h_n, c_n) = module(x, hx, **options)
        return [*trained, y, h_n, c_n, torch.rand(3)]

    short = results()
    assert ways == [True, True]
    with long_way():
        long = results()
    for a, b in zip(short, long, strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype and torch.equal(a, b)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("batch_first", [False, True], ids=["", "batch_first"])
@pytest.mark.parametrize("with_hx", [False, True], ids=["zeros", "hx"])
@pytest.mark.parametrize("with_reset", [False, True], ids=["", "reset"])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_both_ways_give_the_same_bits(config, with_reset, with_hx, batch_first, dtype, ways):
    options = {}
    if with_reset:
        options["reset"] = torch.rand((B, T) if batch_first else (T, B)) < 0.3
    module = fastlstm.LSTM(IN, H, batch_first=batch_first, dtype=dtype, **config)
    hx = make_state(module) if with_hx else None
    x = torch.randn((B, T, IN) if batch_first else (T, B, IN)).to(dtype)
    assert_same_bits_both_ways(module, x, hx, ways, **options)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("with_hx", [False, True], ids=["zeros", "hx"])
@pytest.mark.parametrize("with_reset", [False, True], ids=["", "reset"])
@pytest.mark.parametrize("config", [{}, CONFIGS["all_of_it"] | {"batch_first": True}], ids=str)
def test_so_does_a_sequence_that_comes_alone(config, with_reset, with_hx, dtype, ways):
    options = {"reset": torch.rand(T) < 0.3} if with_reset else {}
    module = fastlstm.LSTM(IN, H, dtype=dtype, **config)
    hx = tuple(state[:, 0].clone() for state in make_state(module)) if with_hx else None
    assert_same_bits_both_ways(module, torch.randn(T, IN).to(dtype), hx, ways, **options)


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("with_hx", [False, True], ids=["zeros", "hx"])
@pytest.mark.parametrize("config", [{}, {"bidirectional": True, "proj_size": 2}], ids=str)
def test_so_do_layers_with_dropout_between_them(config, with_hx, training, ways):
    module = fastlstm.LSTM(IN, H, num_layers=3, dropout=0.4, **config).train(training)
    hx = make_state(module) if with_hx else None
    assert_same_bits_both_ways(module, torch.randn(T, B, IN), hx, ways)


@pytest.mark.parametrize("frozen", [("x",), ("w_ih",), ("w_hh", "b_hh"), ("h0", "b_ih", "b_hh")])
@pytest.mark.parametrize("config", [{}, {"bidirectional": True, "proj_size": 2}], ids=str)
def test_gradients_are_made_of_what_asks_for_them(config, frozen, ways):
    module = fastlstm.LSTM(IN, H, dtype=torch.float64, **config)
    x, (h0, c0) = torch.randn(T, B, IN, dtype=torch.float64), make_state(module)
    given = {"x": x, "h0": h0, "c0": c0}
    for name, p in module.named_parameters():
        given[name.replace("weight", "w").replace("bias", "b").replace("_l0", "")] = p
    wanted = [name for name in given if name.removesuffix("_reverse") not in frozen]
    for name, tensor in given.items():
        tensor.requires_grad_(name in wanted)

    def gradients() -> tuple[Tensor, ...]:
        y, (h_n, c_n) = module(x, (h0, c0))
        return torch.autograd.grad(
            y.sum() + 2 * h_n.sum() + 3 * c_n.sum(), [given[n] for n in wanted]
        )

    short = gradients()
    assert ways == [True]
    with long_way():
        long = gradients()
    assert all(map(torch.equal, short, long))


@pytest.mark.parametrize("used", [(0,), (1,), (2,), (0, 2)], ids=str)
def test_outputs_without_a_gradient(used, ways):
    module = fastlstm.LSTM(IN, H, num_layers=2, dtype=torch.float64)
    x = torch.randn(T, B, IN, dtype=torch.float64, requires_grad=True)

    def gradients() -> tuple[Tensor, ...]:
        y, (h_n, c_n) = module(x)
        loss = sum((y, h_n, c_n)[k].square().sum() for k in used)
        return torch.autograd.grad(loss, [x, *module.parameters()], allow_unused=True)

    short = gradients()
    assert ways == [True]
    with long_way():
        long = gradients()
    for a, b in zip(short, long, strict=True):
        assert (a is None) == (b is None) and (a is None or torch.equal(a, b))


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
@pytest.mark.parametrize("with_hx", [False, True], ids=["zeros", "hx"])
def test_second_order(config, with_hx, ways):
    module = fastlstm.LSTM(IN, H, dtype=torch.float64, **config)
    stock = nn.LSTM(IN, H, dtype=torch.float64, **config)
    stock.load_state_dict(module.state_dict())
    hx = make_state(module) if with_hx else None
    x = torch.randn(T, B, IN, dtype=torch.float64, requires_grad=True)

    def second(m: nn.Module) -> tuple[Tensor, ...]:
        penalty = sum(t.square().sum() for t in everything(m, x, hx, create_graph=True)[3:])  # type: ignore[arg-type]
        return torch.autograd.grad(penalty, [x, *m.parameters()])

    for leaf in hx or ():
        leaf.requires_grad_()
    ours = second(module)
    assert ways == [True]
    for a, b in zip(ours, second(stock), strict=True):
        torch.testing.assert_close(a, b, **tolerance(torch.float64))


def test_second_order_with_resets(ways):
    module = fastlstm.LSTM(IN, H, num_layers=2, bidirectional=True, dtype=torch.float64)
    x = torch.randn(T, B, IN, dtype=torch.float64, requires_grad=True)
    reset = torch.rand(T, B) < 0.3

    def second() -> tuple[Tensor, ...]:
        first = everything(module, x, None, create_graph=True, reset=reset)[3:]
        return torch.autograd.grad(sum(t.square().sum() for t in first), [x, *module.parameters()])

    short = second()
    assert ways == [True]
    with long_way():
        long = second()
    assert all(map(torch.equal, short, long))


RESETS: dict[str, Tensor] = {
    "shape": torch.zeros(T, B + 1, dtype=torch.bool),
    "dtype": torch.zeros(T, B),
    "device": torch.zeros(T, B, dtype=torch.bool, device="meta"),
    "sparse": torch.zeros(T, B, dtype=torch.bool).to_sparse(),
}


@pytest.mark.parametrize("grad", [False, True], ids=["no_grad", "grad"])
@pytest.mark.parametrize("reset", RESETS.values(), ids=RESETS.keys())
def test_resets_that_do_not_fit_are_named(reset, grad):
    module = fastlstm.LSTM(IN, H)
    with torch.set_grad_enabled(grad), pytest.raises((TypeError, ValueError), match="reset: "):
        module(X, reset=reset)


def test_batched_gradients(ways):
    module = fastlstm.LSTM(IN, H, dtype=torch.float64)
    x = torch.randn(T, B, IN, dtype=torch.float64, requires_grad=True)
    y, _ = module(x)
    several = torch.randn(4, *y.shape, dtype=torch.float64)
    leaves = [x, *module.parameters()]
    batched = torch.autograd.grad(y, leaves, several, is_grads_batched=True, retain_graph=True)
    singly = [torch.autograd.grad(y, leaves, one, retain_graph=True) for one in several]
    assert ways == [True]
    for k, got in enumerate(batched):
        expected = torch.stack([one[k] for one in singly])
        torch.testing.assert_close(got, expected, **tolerance(torch.float64))


def test_changes_in_place_are_noticed(ways):
    module = fastlstm.LSTM(IN, H)
    y, _ = module(torch.randn(T, B, IN))
    assert ways == [True]
    with torch.no_grad():
        module.weight_hh_l0.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("batch_first", [False, True], ids=["time_first", "batch_first"])
def test_what_is_saved_of_a_view_is_nobody_elses(batch_first, ways):
    """nn.LSTM saves a copy of such input: it may be changed, or come from inference_mode."""
    stock = nn.LSTM(IN, H, batch_first=batch_first, dtype=torch.float64)
    module = fastlstm.LSTM(IN, H, batch_first=batch_first, dtype=torch.float64)
    module.load_state_dict(stock.state_dict())
    values = torch.randn(T, B, IN, dtype=torch.float64)
    with torch.inference_mode():
        inferred = values.transpose(0, 1).contiguous()
    for x in (values.transpose(0, 1).contiguous().numpy(), inferred):
        got = []
        for each in (module, stock):
            x_again = torch.from_numpy(x.copy()) if x is not inferred else x
            y, _ = each(x_again if batch_first else x_again.transpose(0, 1))
            if x is not inferred:
                x_again.zero_()
            got.append(torch.autograd.grad(y.sum(), list(each.parameters())))
        for a, b in zip(*got, strict=True):
            torch.testing.assert_close(a, b, **tolerance(torch.float64))
    assert ways == [True, True]


def test_saved_tensor_hooks_and_checkpoints(ways):
    module = fastlstm.LSTM(IN, H, num_layers=2, bidirectional=True, dtype=torch.float64)
    x = torch.randn(T, B, IN, dtype=torch.float64, requires_grad=True)
    leaves = [x, *module.parameters()]
    expected = torch.autograd.grad(module(x)[0].square().sum(), leaves)
    with torch.autograd.graph.save_on_cpu():
        loss = module(x)[0].square().sum()
    assert all(map(torch.equal, torch.autograd.grad(loss, leaves), expected))
    y, _ = checkpoint(module, x, use_reentrant=False)
    assert all(map(torch.equal, torch.autograd.grad(y.square().sum(), leaves), expected))
    assert all(ways)


def test_frozen_layers_keep_nothing(monkeypatch):
    asked = []
    entry = backends._TABLE["cpu"]

    def spy(*args: Any) -> Any:
        asked.append(args[-1])
        return cpu.plain_forward(*args)

    monkeypatch.setitem(backends._TABLE, "cpu", dataclasses.replace(entry, plain_forward=spy))
    module = fastlstm.LSTM(IN, H, num_layers=3, backend="cpu")
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(not name.endswith("_l0"))
    y, _ = module(torch.randn(T, B, IN))
    y.sum().backward()
    assert asked == [False, True, True]
    assert module.weight_hh_l0.grad is None and module.weight_hh_l1.grad is not None


@pytest.mark.parametrize("way", [contextlib.nullcontext, long_way], ids=["short", "long"])
def test_two_biases_have_gradients_of_their_own(way):
    module = fastlstm.LSTM(IN, H, bidirectional=True)
    with way():
        y, _ = module(torch.randn(T, B, IN))
        gradients = torch.autograd.grad(y.sum(), list(module.parameters()))
    assert len({g.data_ptr() for g in gradients}) == len(gradients)
    named = dict(zip(dict(module.named_parameters()), gradients, strict=True))
    for suffix in ("_l0", "_l0_reverse"):
        assert torch.equal(named[f"bias_ih{suffix}"], named[f"bias_hh{suffix}"])


def test_parameters_as_states_and_states_that_are_one(ways):
    module = fastlstm.LSTM(IN, H, dtype=torch.float64)
    h = nn.Parameter(torch.randn(1, B, H, dtype=torch.float64))
    x = torch.randn(T, B, IN, dtype=torch.float64)
    (short,) = torch.autograd.grad(module(x, [h, h])[0].sum(), [h])
    assert ways == [True]
    with long_way():
        (long,) = torch.autograd.grad(module(x, [h, h])[0].sum(), [h])
    assert torch.equal(short, long)


@pytest.mark.parametrize("hook", [None, lambda module, args, result: result], ids=["", "hook"])
def test_a_hook_that_is_not_opacus_does_not_matter(hook, ways):
    module = fastlstm.LSTM(IN, H)
    if hook is not None:
        module.register_forward_hook(hook)
    module(X)
    assert ways == [True]


def test_non_contiguous_arguments(ways):
    module = fastlstm.LSTM(IN, H, num_layers=2, bidirectional=True, dtype=torch.float64)
    x = torch.randn(T, IN, B, dtype=torch.float64).transpose(1, 2)
    h0, c0 = (t.transpose(0, 1).contiguous().transpose(0, 1) for t in make_state(module))
    with torch.no_grad():
        module.weight_hh_l0 = nn.Parameter(module.weight_hh_l0.t().contiguous().t())
        y, (h_n, c_n) = module(x, (h0, c0))
        y_2, (h_2, c_2) = module(x.contiguous(), (h0.contiguous(), c0.contiguous()))
    assert ways == [True, True]
    assert torch.equal(y, y_2) and torch.equal(h_n, h_2) and torch.equal(c_n, c_2)
    short = everything(module, x.requires_grad_(), (h0.requires_grad_(), c0.requires_grad_()))
    with long_way():
        assert all(map(torch.equal, short, everything(module, x, (h0, c0))))


class Subclass(Tensor):
    pass


class Mode(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


MODES: dict[str, Callable[[], contextlib.AbstractContextManager[Any]]] = {
    "a_dispatch_mode": Mode,
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "forward_mode": forward_ad.dual_level,
}


@pytest.mark.parametrize("grad", [False, True], ids=["no_grad", "grad"])
@pytest.mark.parametrize("mode", MODES.values(), ids=MODES.keys())
def test_calls_in_a_mode_go_the_long_way(mode, grad, ways):
    module, x = fastlstm.LSTM(IN, H), torch.randn(T, B, IN)
    with torch.set_grad_enabled(grad), mode():
        module(x)
    assert ways == [False]


@pytest.mark.parametrize("mode", MODES.values(), ids=MODES.keys())
def test_a_mode_in_the_backward_pass_alone(mode, ways):
    module = fastlstm.LSTM(IN, H, dtype=torch.float64)
    leaves = [torch.randn(T, B, IN, dtype=torch.float64, requires_grad=True), *module.parameters()]
    plain_gradients = torch.autograd.grad(module(leaves[0])[0].sum(), leaves)
    y, _ = module(leaves[0])
    with mode():
        gradients = torch.autograd.grad(y.sum(), leaves)
    assert ways == [True, True]
    for a, b in zip(gradients, plain_gradients, strict=True):
        torch.testing.assert_close(a, b, **tolerance(torch.float64))


def changed(change: Callable[[fastlstm.LSTM], Any], **config: Any) -> fastlstm.LSTM:
    module = fastlstm.LSTM(IN, H, **config)
    change(module)
    return module


LONG: dict[str, Callable[[], tuple[fastlstm.LSTM, Tensor]]] = {
    "a_subclass": lambda: (fastlstm.LSTM(IN, H), X.as_subclass(Subclass)),
    "another_backend": lambda: (fastlstm.LSTM(IN, H, backend="reference"), X),
    "pruned": lambda: (changed(lambda m: prune.random_unstructured(m, "weight_hh_l0", 0.5)), X),
    "parametrized": lambda: (
        changed(lambda m: parametrizations.weight_norm(m, "weight_hh_l0")),
        X,
    ),
    "no_sequences": lambda: (fastlstm.LSTM(IN, H), torch.zeros(T, 0, IN)),
}


@pytest.mark.parametrize("grad", [False, True], ids=["no_grad", "grad"])
@pytest.mark.parametrize("make", LONG.values(), ids=LONG.keys())
def test_what_is_not_plain_goes_the_long_way(make, grad, ways):
    module, x = make()
    with torch.set_grad_enabled(grad):
        module(x)
    assert ways == [False]


def test_only_training_with_checkpoints_is_not_plain(ways):
    module = fastlstm.LSTM(IN, H, checkpoint=True)
    module(X)
    with torch.no_grad():
        module(X)
    assert ways == [False, True]


def test_nothing_is_saved_where_nothing_asks_for_a_gradient(ways):
    module = fastlstm.LSTM(IN, H).requires_grad_(False)
    y, (h_n, c_n) = module(X)
    assert ways == [True]
    assert not (y.requires_grad or h_n.requires_grad or c_n.requires_grad)
    y, _ = module(X.clone().requires_grad_())
    assert y.requires_grad


MISFITS: dict[str, tuple[type[Exception], Callable[[], tuple[Any, ...]]]] = {
    "features": (RuntimeError, lambda: (torch.randn(T, B, IN + 1),)),
    "dtype": (ValueError, lambda: (torch.randn(T, B, IN, dtype=torch.float64),)),
    "meta": (RuntimeError, lambda: (torch.randn(T, B, IN, device="meta"),)),
    "sparse": (TypeError, lambda: (torch.randn(T, B, IN).to_sparse(),)),
    "no_steps": (RuntimeError, lambda: (torch.randn(0, B, IN),)),
    "integers": (ValueError, lambda: (torch.zeros(T, B, IN, dtype=torch.int64),)),
    "hx_shape": (RuntimeError, lambda: (X, (torch.zeros(1, B + 1, H), torch.zeros(1, B + 1, H)))),
    "hx_dtype": (RuntimeError, lambda: (X, (torch.zeros(1, B, H).double(), torch.zeros(1, B, H)))),
    "hx_device": (
        RuntimeError,
        lambda: (X, (torch.zeros(1, B, H, device="meta"), torch.zeros(1, B, H))),
    ),
    "hx_of_nones": (TypeError, lambda: (X, (None, None))),
    "hx_single": (TypeError, lambda: (X, torch.zeros(2, 1, B, H))),
    "hx_of_three": (RuntimeError, lambda: (X, (torch.zeros(1, B, H),) * 3)),
}


@pytest.mark.parametrize("grad", [False, True], ids=["no_grad", "grad"])
@pytest.mark.parametrize(("error", "make"), MISFITS.values(), ids=MISFITS.keys())
def test_errors_are_those_of_the_long_way(error, make, grad):
    module, args = fastlstm.LSTM(IN, H), make()
    with torch.set_grad_enabled(grad):
        with pytest.raises(error) as short:
            module(*args)
        with long_way(), pytest.raises(error) as long:
            module(*args)
    assert str(short.value) == str(long.value) and short.type is long.type


@pytest.mark.parametrize("grad", [False, True], ids=["no_grad", "grad"])
@pytest.mark.parametrize(
    "config", [{}, {"num_layers": 2}, {"num_layers": 2, "dropout": 0.3}], ids=str
)
@pytest.mark.parametrize("x", [X, X[:, 0]], ids=["batch", "alone"])
@pytest.mark.parametrize(
    "size", [(), (H,), (1, H), (2, H), (3, H), (1, B, H), (2, B, H), (3, B, H)]
)
@pytest.mark.parametrize("wrong", [(0, 1), (1,)], ids=["both", "c0"])
def test_states_that_do_not_fit_are_named(wrong, size, x, config, grad):
    """More of them than there are layers, fewer, or of another rank; no mask is drawn."""
    module, layers = fastlstm.LSTM(IN, H, **config), config.get("num_layers", 1)
    fits = (layers, B, H) if x.dim() == 3 else (layers, H)
    hx = tuple(torch.zeros(size if k in wrong else fits) for k in range(2))
    outcomes = []
    for way in (contextlib.nullcontext, long_way):
        torch.manual_seed(0)
        with way(), torch.set_grad_enabled(grad):
            try:
                outcomes.append([module(x, hx)[0]])
            except RuntimeError as error:
                outcomes.append([str(error)])
        outcomes[-1].append(torch.rand(1))
    assert (size == fits) is isinstance(outcomes[0][0], Tensor)
    for short, long in zip(*outcomes, strict=True):
        assert short == long if isinstance(short, str) else torch.equal(short, long)


def weight(name: str, value: Tensor) -> Callable[[fastlstm.LSTM], None]:
    return lambda module: setattr(module, name, nn.Parameter(value, requires_grad=False))


ERRORS = (TypeError, ValueError, RuntimeError)
STRANGE: dict[str, Callable[[fastlstm.LSTM], None]] = {
    "more_columns": weight("weight_hh_l0", torch.zeros(4 * H, H + 1)),
    "fewer_rows": weight("weight_hh_l0", torch.zeros(4 * H - 4, H)),
    "a_vector": weight("weight_hh_l0", torch.zeros(4 * H)),
    "no_rows": weight("weight_hh_l0", torch.zeros(0, H)),
    "other_inputs": weight("weight_ih_l0", torch.zeros(4 * H, IN + 1)),
    "another_dtype": weight("bias_hh_l0", torch.zeros(4 * H, dtype=torch.float64)),
    "on_meta": weight("weight_ih_l0", torch.zeros(4 * H, IN, device="meta")),
    "sparse": weight("weight_ih_l0", torch.zeros(4 * H, IN).to_sparse()),
    "another_hidden_size": lambda module: setattr(module, "hidden_size", H + 1),
    "another_input_size": lambda module: setattr(module, "input_size", IN + 1),
}


@pytest.mark.parametrize("grad", [False, True], ids=["no_grad", "grad"])
@pytest.mark.parametrize("strange", STRANGE.values(), ids=STRANGE.keys())
def test_a_strange_module_fares_as_the_long_way(strange, grad):
    module = fastlstm.LSTM(IN, H)
    strange(module)
    with torch.set_grad_enabled(grad):
        with pytest.raises(ERRORS) as short:
            module(X)
        with long_way(), pytest.raises(ERRORS) as long:
            module(X)
    assert str(short.value) == str(long.value) and short.type is long.type


def test_only_the_library_has_plain_calls():
    entries = backends._TABLE.values()
    assert [entry.name for entry in entries if entry.plain_forward is not None] == ["cpu"]

"""fastlstm.LSTM against torch.nn.LSTM: values, gradients, parameters, errors."""

from __future__ import annotations

import copy
import io
import pickle
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import fastlstm
import fastlstm.compat
from cases import tolerance
from fastlstm import build, native

BACKENDS = ["reference", "aten", "cpu"]
LEAVES = [fastlstm.LSTM, fastlstm.compat.LSTM]
T, B, IN, H = 5, 3, 4, 6

CONFIGS = {
    "plain": {},
    "two_layers": {"num_layers": 2},
    "no_bias": {"bias": False, "num_layers": 2},
    "bidirectional": {"bidirectional": True},
    "two_layers_bidirectional": {"num_layers": 2, "bidirectional": True},
    "proj": {"proj_size": 2},
    "proj_two_layers_bidirectional": {"proj_size": 2, "num_layers": 2, "bidirectional": True},
    "proj_no_bias": {"proj_size": 2, "bias": False},
}
FORMS = ["padded", "batch_first", "unbatched", "unbatched_batch_first", "packed", "packed_unsorted"]


def make_pair(dtype: torch.dtype = torch.float64, backend: str = "auto", **config: Any):
    """The stock module and ours with the same weights."""
    stock = nn.LSTM(IN, H, dtype=dtype, **config)
    ours = fastlstm.LSTM(IN, H, dtype=dtype, backend=backend, **config)
    ours.load_state_dict(stock.state_dict())
    return stock, ours


def make_state(module: nn.LSTM, batch: int | None = B) -> tuple[Tensor, Tensor]:
    layers = module.num_layers * (2 if module.bidirectional else 1)
    lead = (layers,) if batch is None else (layers, batch)
    dtype = module.weight_ih_l0.dtype
    return (
        torch.randn(*lead, module.proj_size or H, dtype=dtype),
        torch.randn(*lead, H, dtype=dtype),
    )


def flat(result: Any) -> list[Tensor]:
    """Tensors of a module's result, a PackedSequence as its data and indices."""
    if isinstance(result, Tensor):
        return [result]
    return [t for part in result if part is not None for t in flat(part)]


def values_and_gradients(
    module: nn.Module, run: Callable[..., Any], leaves: Sequence[Tensor]
) -> list[Tensor]:
    """What ``run(module, *leaves)`` returns, and the gradients of a random weighting of it
    for ``leaves`` and for the parameters, zero where nothing depends on them."""
    leaves = [t.detach().clone().requires_grad_() for t in leaves]
    values = flat(run(module, *leaves))
    generator = torch.Generator().manual_seed(1)
    loss = sum(
        (v * torch.randn(v.shape, generator=generator, dtype=v.dtype)).sum()
        for v in values
        if v.is_floating_point()
    )
    wanted = [*leaves, *module.parameters()]
    return values + list(torch.autograd.grad(loss, wanted, materialize_grads=True))


def assert_same(actual: Sequence[Tensor], expected: Sequence[Tensor], dtype: torch.dtype) -> None:
    assert len(actual) == len(expected)
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, **tolerance(dtype))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("with_hx", [False, True], ids=["zeros", "hx"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_values_and_gradients_are_those_of_nn_lstm(config, form, with_hx, dtype, backend):
    stock, ours = make_pair(dtype, backend, batch_first="batch_first" in form, **config)
    unbatched, packed = "unbatched" in form, "packed" in form
    shape = (T, IN) if unbatched else (B, T, IN) if form == "batch_first" else (T, B, IN)
    lengths = [5, 4, 2] if form == "packed" else [2, 5, 4]

    def run(module, x, *hx):
        if packed:
            x = pack_padded_sequence(x, lengths, enforce_sorted=form == "packed")
        return module(x, hx or None)

    leaves = [torch.randn(shape, dtype=dtype)]
    if with_hx:
        leaves += make_state(stock, None if unbatched else B)
    assert_same(
        values_and_gradients(ours, run, leaves), values_and_gradients(stock, run, leaves), dtype
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(1, 1, IN), (1, B, IN), (T, 1, IN), (T, 0, IN)])
def test_smallest_sizes(shape, backend):
    stock, ours = make_pair(backend=backend, num_layers=2, bidirectional=True)
    leaves = [torch.randn(shape, dtype=torch.float64), *make_state(stock, shape[1])]

    def run(module, x, *hx):
        return module(x, hx)

    assert_same(
        values_and_gradients(ours, run, leaves),
        values_and_gradients(stock, run, leaves),
        torch.float64,
    )


def test_input_may_be_non_contiguous_and_expanded():
    stock, ours = make_pair()
    strided = torch.randn(T, IN, B, dtype=torch.float64).transpose(1, 2)
    expanded = torch.randn(T, 1, IN, dtype=torch.float64).expand(T, B, IN)
    for x in (strided, expanded):
        assert_same(flat(ours(x)), flat(stock(x)), torch.float64)


def test_nan_and_inf_flow_through():
    stock, ours = make_pair()
    x = torch.randn(T, B, IN, dtype=torch.float64)
    x[1, 0, 0], x[2, 1, 1] = float("nan"), float("inf")
    for a, e in zip(flat(ours(x)), flat(stock(x)), strict=True):
        torch.testing.assert_close(a, e, equal_nan=True, **tolerance(torch.float64))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("form", ["padded", "batch_first", "packed"])
@pytest.mark.parametrize("p", [0.5, 1.0])
def test_dropout_masks_are_those_of_nn_lstm(form, p, backend):
    config = {"num_layers": 3, "bidirectional": True, "batch_first": form == "batch_first"}
    stock, ours = make_pair(backend=backend, dropout=p, **config)
    x = torch.randn((B, T, IN) if form == "batch_first" else (T, B, IN), dtype=torch.float64)

    def run(module, x):
        torch.manual_seed(3)
        return module(pack_padded_sequence(x, [5, 4, 2]) if form == "packed" else x)

    assert_same(
        values_and_gradients(ours, run, [x]), values_and_gradients(stock, run, [x]), torch.float64
    )
    assert not torch.equal(flat(ours(x))[0], flat(ours.eval()(x))[0])
    assert_same(flat(ours(x)), flat(stock.eval()(x)), torch.float64)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
@pytest.mark.parametrize("leaf", LEAVES)
def test_parameters_are_those_of_nn_lstm(leaf, config):
    torch.manual_seed(7)
    stock = nn.LSTM(IN, H, **config)
    torch.manual_seed(7)
    ours = leaf(IN, H, **config)
    assert [n for n, _ in ours.named_parameters()] == [n for n, _ in stock.named_parameters()]
    for a, e in zip(ours.parameters(), stock.parameters(), strict=True):
        assert torch.equal(a, e)  # initialised alike under the same seed
    assert list(ours.state_dict()) == list(stock.state_dict())
    assert [len(w) for w in ours.all_weights] == [len(w) for w in stock.all_weights]
    for source, target in ((stock, leaf(IN, H, **config)), (ours, nn.LSTM(IN, H, **config))):
        target.load_state_dict(source.state_dict())
        assert all(
            torch.equal(a, b) for a, b in zip(source.parameters(), target.parameters(), strict=True)
        )
    assert repr(ours) == repr(stock)


@pytest.mark.parametrize("leaf", LEAVES)
def test_constructor_takes_positional_arguments(leaf):
    arguments = (IN, H, 2, False, True, 0.25, True, 3, "cpu", torch.float64)
    ours = leaf(*arguments)
    assert repr(ours) == repr(nn.LSTM(*arguments))
    assert ours.weight_ih_l0.dtype == torch.float64


def test_leaves_are_rnns():
    assert isinstance(fastlstm.LSTM(IN, H), nn.RNNBase)
    assert not isinstance(fastlstm.LSTM(IN, H), nn.LSTM)
    assert isinstance(fastlstm.compat.LSTM(IN, H), nn.LSTM)
    assert isinstance(fastlstm.compat.LSTM(IN, H), fastlstm.LSTM)


def test_repr_shows_a_backend_that_was_named():
    assert (
        repr(fastlstm.LSTM(IN, H, backend="reference")) == f"LSTM({IN}, {H}, backend='reference')"
    )


@pytest.mark.parametrize("leaf", LEAVES)
def test_copies(leaf):
    ours = leaf(IN, H, 2, backend="reference")
    x = torch.randn(T, B, IN)
    expected = flat(ours(x))
    buffer = io.BytesIO()
    torch.save(ours, buffer)
    buffer.seek(0)
    copies = [
        copy.deepcopy(ours),
        pickle.loads(pickle.dumps(ours)),
        torch.load(buffer, weights_only=False),
    ]
    for copied in copies:
        assert type(copied) is leaf
        assert copied.backend == "reference"
        assert copied.weight_ih_l0 is not ours.weight_ih_l0
        assert_same(flat(copied(x)), expected, torch.float32)
        with torch.no_grad():
            copied.weight_hh_l0.zero_()  # the copy runs on its own weights
        assert not torch.equal(flat(copied(x))[0], expected[0])


def test_pickles_without_a_backend_have_the_default():
    ours = fastlstm.LSTM(IN, H, backend="reference")
    state = ours.__getstate__()
    del state["backend"]
    restored = fastlstm.LSTM.__new__(fastlstm.LSTM)
    restored.__setstate__(state)
    assert restored.backend == "auto"
    assert_same(
        flat(restored(torch.ones(T, B, IN))), flat(ours(torch.ones(T, B, IN))), torch.float32
    )


def test_module_follows_to_and_flatten_parameters():
    ours = fastlstm.LSTM(IN, H).double()
    ours.flatten_parameters()
    assert ours(torch.randn(T, B, IN, dtype=torch.float64))[0].dtype == torch.float64


def test_functional_call_uses_the_weights_it_is_given():
    stock, ours = make_pair(torch.float32)
    weights = {n: p.detach().double() * 2 for n, p in stock.named_parameters()}
    x = torch.randn(T, B, IN, dtype=torch.float64)
    expected = torch.func.functional_call(stock, weights, (x,))
    assert_same(flat(torch.func.functional_call(ours, weights, (x,))), flat(expected), x.dtype)
    assert ours(x.float())[0].dtype == torch.float32


class LowRank(nn.Module):
    """A weight and what LoRA adds to it."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.down = nn.Parameter(weight.new_ones(2, weight.size(1)))
        self.up = nn.Parameter(weight.new_ones(weight.size(0), 2) / 10)

    def forward(self, weight: Tensor) -> Tensor:
        return weight + self.up @ self.down


@pytest.mark.parametrize("wrap", ["parametrization", "spectral", "lora", "hook", "prune"])
def test_replaced_weights_take_effect_and_get_gradients(wrap):
    stock, ours = make_pair()
    for module in (stock, ours):
        torch.manual_seed(5)
        if wrap == "parametrization":
            parametrizations.weight_norm(module, "weight_hh_l0")
        elif wrap == "spectral":
            parametrizations.spectral_norm(module, "weight_hh_l0").eval()
        elif wrap == "lora":
            low_rank = LowRank(module.weight_hh_l0)
            nn.utils.parametrize.register_parametrization(module, "weight_hh_l0", low_rank)
        elif wrap == "hook":
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)
                nn.utils.weight_norm(module, "weight_hh_l0")
        else:
            prune.random_unstructured(module, "weight_hh_l0", amount=0.5)
    with torch.no_grad():
        for module in (stock, ours):
            for parameter in module.parameters():
                parameter.mul_(1.5)
    leaves = [torch.randn(T, B, IN, dtype=torch.float64)]

    def run(module, x):
        return module(x)

    assert_same(
        values_and_gradients(ours, run, leaves),
        values_and_gradients(stock, run, leaves),
        torch.float64,
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_second_order_gradients(backend):
    ours = fastlstm.LSTM(2, 3, 2, bidirectional=True, dtype=torch.float64, backend=backend)
    names = [n for n, _ in ours.named_parameters()]

    def run(x, h, c, *weights):
        return flat(
            torch.func.functional_call(ours, dict(zip(names, weights, strict=True)), (x, (h, c)))
        )

    leaves = [torch.randn(2, 2, 2), torch.randn(4, 2, 3), torch.randn(4, 2, 3)]
    leaves += [p.detach() for p in ours.parameters()]
    leaves = [t.double().requires_grad_() for t in leaves]
    assert torch.autograd.gradcheck(run, leaves, fast_mode=True)
    assert torch.autograd.gradgradcheck(run, leaves, fast_mode=True)


@pytest.mark.parametrize("proj_size", [0, 2])
def test_autocast_casts_all_but_float64(proj_size):
    ours = fastlstm.LSTM(IN, H, proj_size=proj_size)
    x, (h0, c0) = torch.randn(T, B, IN), make_state(ours)
    expected = ours(x, (h0, c0))[0]
    double = copy.deepcopy(ours).double()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        results = flat(ours(x, (h0, c0)))
        assert {t.dtype for t in results} == {torch.bfloat16}
        assert torch.equal(ours(x, (h0.bfloat16(), c0))[0], results[0])
        assert double(x.double())[0].dtype == torch.float64
    results[0].sum().backward()
    assert ours.weight_hh_l0.grad.dtype == torch.float32
    torch.testing.assert_close(results[0].float(), expected, **tolerance(torch.bfloat16))


def test_autocast_cells_have_the_dtype_of_output():
    ours = fastlstm.LSTM(IN, H)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output, _, cells = ours(torch.randn(T, B, IN), return_cells=True)
    assert output.dtype == cells.dtype == torch.bfloat16


def test_checkpoint_is_a_bool_as_bias_is():
    with pytest.raises(TypeError, match="checkpoint should be of type bool, got: str"):
        fastlstm.LSTM(IN, H, checkpoint="no")


def test_unknown_backend():
    with pytest.raises(ValueError, match=r"backend.*'nonesuch'.*'auto'.*'reference'"):
        fastlstm.LSTM(IN, H, backend="nonesuch")
    with pytest.raises(ValueError, match=r"backend: got \['cpu'\]"):
        fastlstm.LSTM(IN, H, backend=["cpu"])


@pytest.mark.parametrize(
    "arguments",
    [
        {"dropout": 1.5},
        {"hidden_size": 0},
        {"hidden_size": 2.5},
        {"bias": 1},
        {"num_layers": 0},
        {"proj_size": H},
    ],
    ids=str,
)
def test_constructor_raises_as_nn_lstm(arguments):
    arguments = {"input_size": IN, "hidden_size": H, **arguments}
    with pytest.raises((ValueError, TypeError)) as expected:
        nn.LSTM(**arguments)
    with pytest.raises(expected.type) as got:
        fastlstm.LSTM(**arguments)
    assert str(got.value) == str(expected.value)


X = torch.zeros(T, B, IN)
HX = torch.zeros(1, B, H)
PACKED = pack_padded_sequence(X, [5, 4, 2])
# Arguments that nn.LSTM refuses on purpose: (input, hx), what our message must name.
REFUSED: dict[str, tuple[Any, Any, str]] = {
    "rank_1": (X[0, 0], None, "input to be 2D or 3D, got 1D"),
    "rank_4": (X[None], None, "input to be 2D or 3D, got 4D"),
    "features": (torch.zeros(T, B, IN + 1), None, r"input\.size\(-1\).*Expected 4, got 5"),
    "dtype": (X.double(), None, r"input dtype \(torch.float64\).*weight dtype \(torch.float32\)"),
    "integers": (X.long(), None, r"input dtype \(torch.int64\)"),
    "no_steps": (X[:0], None, r"sequence length.*input has shape \(0, 3, 4\)"),
    "device": (X.to("meta"), None, "Input and parameter tensors.*meta.*cpu"),
    "packed_dtype": (PACKED.to(torch.float64), None, r"input dtype \(torch.float64\)"),
    "packed_features": (pack_padded_sequence(torch.zeros(T, B, IN + 1), [5, 4, 2]), None, "got 5"),
    "packed_device": (PackedSequence(PACKED.data.to("meta"), PACKED.batch_sizes), None, "meta"),
    "hx_batch": (X, (HX[:, :1], HX), r"hx\[0\].*hidden\[0\] size \(1, 3, 6\), got \[1, 1, 6\]"),
    "cx_batch": (X, (HX, HX[:, :1]), r"hx\[1\].*hidden\[1\] size \(1, 3, 6\), got \[1, 1, 6\]"),
    "hx_features": (X, (HX[..., :2], HX), r"hx\[0\]"),
    "hx_layers": (X, (HX.repeat(2, 1, 1), HX), r"hx\[0\]"),
    "hx_rank": (X, (HX[0], HX), r"batched 3-D input, hx.*\(2-D, 3-D\)"),
    "hx_rank_unbatched": (X[:, 0], (HX, HX), r"unbatched 2-D input, hx.*\(3-D, 3-D\)"),
    "hx_dtype": (X, (HX.double(), HX), r"hx\[0\].*float32.*float64"),
    "cx_dtype": (X, (HX, HX.double()), r"hx\[1\].*float32.*float64"),
    "hx_device": (X, (HX.to("meta"), HX), r"Input and hidden tensors.*cpu.*hx\[0\].*meta"),
    "three_states": (X, (HX, HX, HX), "hx.*two hidden states.*got 3"),
    "packed_hx_batch": (PACKED, (HX[:, :1], HX), r"hx\[0\].*\(1, 3, 6\), got \[1, 1, 6\]"),
    "packed_hx_dtype": (PACKED, (HX.double(), HX.double()), r"hx\[0\]"),
}


@pytest.mark.parametrize(("input", "hx", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_wrong_arguments_raise_as_nn_lstm(input, hx, message):
    with pytest.raises((RuntimeError, ValueError)) as expected:
        nn.LSTM(IN, H)(input, hx)
    with pytest.raises(expected.type, match=message):
        fastlstm.LSTM(IN, H)(input, hx)


@pytest.mark.parametrize("backend", BACKENDS)
def test_wrong_dtypes_among_the_weights_are_refused(backend):
    ours = fastlstm.LSTM(IN, H, backend=backend)
    ours.weight_hh_l0 = nn.Parameter(ours.weight_hh_l0.double())
    with pytest.raises((RuntimeError, ValueError), match=r"w_hh.*float64.*float32"):
        ours(X)


# Arguments on which nn.LSTM fails by accident.
@pytest.mark.parametrize(
    ("input", "hx", "message"),
    [
        (None, None, "input: expected a Tensor or a PackedSequence, got NoneType"),
        ([1.0], None, r"input: .*got list of \(float\)"),
        ([1.0] * 1000, None, r"got list of \(float, float, float, float, \.\.\.\)$"),
        (PackedSequence(X.numpy(), PACKED.batch_sizes), None, r"input\.data: .*got ndarray"),
        (X, HX, r"hx: expected a tuple of two Tensors \(h_0, c_0\), got Tensor"),
        (X, (None, None), r"hx: .*got tuple of \(NoneType, NoneType\)"),
        (PACKED, HX, "hx: .*got Tensor"),
    ],
)
def test_wrong_types(input, hx, message):
    with pytest.raises(TypeError, match=message):
        fastlstm.LSTM(IN, H)(input, hx)


def test_a_packed_sequence_without_steps():
    empty = PackedSequence(torch.zeros(0, IN), torch.zeros(0, dtype=torch.int64))
    with pytest.raises(RuntimeError, match=r"sequence length.*no batch_sizes"):
        fastlstm.LSTM(IN, H)(empty)


@pytest.mark.parametrize("sizes", [[3, 3, 3, 3], [1, 2, 5], [3, 3, 1], [9, -1]], ids=str)
def test_a_packed_sequence_that_contradicts_itself(sizes):
    broken = PackedSequence(torch.zeros(8, IN), torch.tensor(sizes))
    with pytest.raises(RuntimeError, match=r"batch_sizes.*8 rows"):
        fastlstm.LSTM(IN, H)(broken)


def test_going_on_without_the_library_is_said_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """backend="auto" then takes another backend, and must not do so in silence."""

    def unbuilt() -> str:
        raise build.BuildError("no compiler here")

    monkeypatch.setattr(build, "library_path", unbuilt)
    native.missing.cache_clear()
    module = fastlstm.LSTM(2, 3)
    try:
        with pytest.warns(UserWarning, match=r"without its .* kernels: no compiler here") as said:
            [module(torch.randn(4, 1, 2)) for _ in range(2)]
        assert len(said) == 1
        assert fastlstm.available_backends()["cpu"] == "no compiler here"
    finally:
        native.missing.cache_clear()
